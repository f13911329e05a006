"""Any timm or transformers image classifier behind one interface: pixels in, logits and representation out.

The library's classifier is taken out of its network and kept beside it. The network then ends with the
classifier's input, the representation, so one pass gives both, without hooks; ``Backbone.native`` puts the
classifier back for saving.
"""

from __future__ import annotations

import inspect
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors import SafetensorError
from timm.data.model_config import resolve_input_data_config
from timm.models import resolve_model_input_args
from torch import Tensor, nn

from arrest_hub.errors import BackboneError
from arrest_hub.heads import ClassificationHead, Slot, head_names, reset_transformers_head, set_submodule
from arrest_hub.model_config import no_head
from arrest_hub.model_source import LocatedModel, ModelSource, find_weights, locate
from arrest_hub.transforms import Preprocessing

__all__ = ["Backbone", "BackboneOutput", "ModelSource", "load_backbone"]

# What the libraries raise when a config and its weights, or a config and its architecture, do not fit.
_BUILD_ERRORS = (
    RuntimeError,  # load_state_dict: missing and unexpected keys, shapes; torch.load: unsafe pickles
    TypeError,
    ValueError,
    KeyError,
    AttributeError,
    AssertionError,
    OSError,
    ImportError,
    EOFError,
    pickle.UnpicklingError,
    SafetensorError,
)


class BackboneOutput(NamedTuple):
    """``logits`` [B, num_classes]; ``representation`` [B, num_features], the classification head's input."""

    logits: Tensor
    representation: Tensor


class Backbone(nn.Module):
    """An image classifier over pixels in [0, 1]; the mean and standard deviation are applied inside.

    ``body`` is the library's network without its head, ``head(representation)`` gives the logits. Building
    one runs a self check (eval mode, a random image of its own generator) and raises BackboneError for an
    architecture whose head cannot be taken out without changing the logits.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        native: nn.Module,
        source: ModelSource,
        preprocessing: Preprocessing,
        label_names: Sequence[str] | None = None,
        processor: Any = None,
    ) -> None:
        super().__init__()
        self.source = source
        self.preprocessing = preprocessing
        self.label_names = None if label_names is None else list(label_names)
        self.memory_format = torch.contiguous_format
        self.processor = processor  # the transformers image processor, written back by export
        self.body = native
        self._head_names = head_names(native, source)
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).view(1, 3, 1, 1), persistent=False)
        self.num_features = 0
        self.new_head = False  # whether the head came after the weights, at random
        self._num_classes = 0
        self.head = ClassificationHead([self.body.get_submodule(name) for name in self._head_names])
        self.eval()
        self._self_check()

    @property
    def num_classes(self) -> int:
        """The number of classes the head distinguishes."""
        return self._num_classes

    def normalize(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1], [B, 3, H, W] -> the native network's input."""
        return (pixels - self.mean) / self.std

    def forward(self, pixels: Tensor) -> BackboneOutput:
        """Float images [B, 3, H, W] in [0, 1] -> logits and representation, in one pass.

        Raises BackboneError for whole numbers, which would be taken for pixels far outside [0, 1].
        """
        if not pixels.is_floating_point():
            raise BackboneError(f"pixels of type {pixels.dtype}: give floats in [0, 1], such as images / 255.")
        normalized = self.normalize(pixels).contiguous(memory_format=self.memory_format)
        representation = _output_tensor(self.body(normalized)).flatten(1)
        return BackboneOutput(self.head(representation), representation)

    @contextmanager
    def native(self) -> Iterator[Any]:
        """The plain timm or transformers network with its head in place; ``forward`` must wait meanwhile."""
        for name, classifier in zip(self._head_names, self.head.classifiers, strict=True):
            set_submodule(self.body, name, classifier)
        try:
            yield self.body
        finally:
            self._take_head_out()

    def reset_head(self, label_names: Sequence[str] | int) -> None:
        """A fresh head, initialised from the global generator, for these classes (names or their number)."""
        names = None if isinstance(label_names, int) else [str(name) for name in label_names]
        count = label_names if isinstance(label_names, int) else len(label_names)
        if count < 1:
            raise ValueError(f"A classification head needs at least one class, not {count}.")
        with self.native() as network:
            if self.source.library == "timm":
                # of two heads (RepViT) timm keeps the second only if told to
                keep_both = "distillation" in inspect.signature(network.reset_classifier).parameters
                network.reset_classifier(count, **({"distillation": len(self._head_names) > 1} if keep_both else {}))
                for key in ("label_names", "label_descriptions"):  # of the classes before
                    network.pretrained_cfg.pop(key, None)
            else:
                reset_transformers_head(network, self._head_names, count, names)
        self.head.train(self.training)
        self.label_names = names
        self.new_head = True
        self._num_classes = count

    def _take_head_out(self) -> None:
        count = len(self._head_names)
        for index, name in enumerate(self._head_names):
            self.head.classifiers[index] = self.body.get_submodule(name)
            set_submodule(self.body, name, nn.Identity() if count == 1 else Slot(index, count, self.head.widths))

    def _self_check(self) -> None:
        """Compare with the native network's own logits; sets ``num_features`` and ``num_classes``.

        Parameters that the logits do not depend on (a mask token, an unused pooler) are frozen:
        DistributedDataParallel would wait for their gradients.
        """
        generator = torch.Generator().manual_seed(0)
        pixels = torch.rand(2, 3, *self.preprocessing.size, generator=generator)
        where = f"{self.source.architecture} (model {self.source.model_id!r})"
        try:
            with torch.no_grad(), self.native() as network:
                expected = _output_tensor(network(self.normalize(pixels)))
        except (RuntimeError, ValueError, AssertionError, TypeError) as error:
            height, width = self.preprocessing.size
            raise BackboneError(
                f"{where} cannot process an image of {height}x{width} pixels ({_first_line(error)}). "
                "Leave the image size out, or give one that the architecture allows."
            ) from error
        inseparable = BackboneError(
            f"The classification head of {where} cannot be separated from its network, which this method "
            "needs. Use another architecture, such as 'timm/resnet50.a1_in1k' or 'timm/vit_small_patch16_224'."
        )
        if not isinstance(expected, Tensor) or expected.ndim != 2:
            raise inseparable
        if not expected.isfinite().all():
            raise BackboneError(
                f"{where} gives logits that are not finite: its weights are damaged. Download or export them again."
            )
        # some networks (LeViT) keep in eval mode what they computed from their weights, here without a gradient, until
        # they leave it
        self.train().eval()
        try:
            with torch.enable_grad():
                logits, representation = self(pixels)
        except (RuntimeError, ValueError, AssertionError, TypeError, AttributeError) as error:
            raise inseparable from error
        scale = max(1.0, expected.abs().max().item())
        if logits.shape != expected.shape or not torch.allclose(logits, expected, rtol=1e-4, atol=1e-4 * scale):
            raise inseparable
        self.num_features = representation.shape[1]
        self._num_classes = logits.shape[1]
        used = _parameters_behind(logits)
        for parameter in self.parameters():
            if parameter.requires_grad:
                parameter.requires_grad_(parameter in used)
        self.train().eval()


def load_backbone(
    model_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    pretrained: bool = True,
    num_classes: int | None = None,
    head_if_none: int | None = None,
    image_size: int | None = None,
    model_args: Mapping[str, Any] | None = None,
    allow_pickle: bool = False,
    cache_dir: str | Path | None = None,
) -> Backbone:
    """A Backbone, on the CPU, in float32 and in eval mode.

    ``model_id`` is a folder with a config.json (timm's or transformers'), ``timm/<name>`` for timm's weights
    on the Hub, ``org/name[@revision]`` on the Hub, or the bare name of a timm architecture, which starts from
    a random initialisation. ``pretrained=False`` keeps the architecture of an id with weights, with random
    ones. ``num_classes`` replaces a head of another size by a fresh one, and puts one on a network that has none,
    which is all that ``head_if_none`` does (`new_head` tells); ``image_size`` (pixels, square) overrides the model's
    own; ``model_args`` are timm's keyword arguments for a bare architecture name.
    Weights are safetensors; ``allow_pickle`` admits pickles, read by torch.load(weights_only=True).

    Loading weights leaves the global random generator as it was; a random initialisation draws from it.
    Raises BackboneError, or HubError when the Hub cannot serve the model.
    """
    model_id = os.fspath(model_id)
    if not model_id:
        raise BackboneError("The model id is empty. Give one such as 'timm/resnet50.a1_in1k'.")
    for name, value in (("num_classes", num_classes), ("head_if_none", head_if_none), ("image_size", image_size)):
        if value is not None and value < 1:
            raise BackboneError(f"{name} is {value} for model {model_id!r}; it must be a positive whole number.")
    count_if_none = num_classes or head_if_none
    located = locate(
        model_id, revision=revision, pretrained=pretrained, head_wanted=count_if_none is None,
        allow_pickle=allow_pickle, cache_dir=cache_dir,
    )  # fmt: skip
    if model_args and located.folder is not None:
        raise BackboneError(
            f"model_args {dict(model_args)} were given for model {model_id!r}, whose architecture its config.json "
            "fixes. Give them with a bare timm architecture name, or leave them out."
        )
    build = partial(
        _build_timm if located.source.library == "timm" else _build_transformers, head_if_none=count_if_none
    )
    if located.source.pretrained:
        with torch.random.fork_rng(devices=[]):
            backbone = build(located, image_size, {}, allow_pickle)
    else:
        args = dict(model_args or {})
        if located.folder is None and num_classes is not None:
            args.setdefault("num_classes", num_classes)
        backbone = build(located, image_size, args, allow_pickle)
    if num_classes is not None and backbone.num_classes != num_classes:
        backbone.reset_head(num_classes)
    return backbone


def _build_timm(
    located: LocatedModel,
    image_size: int | None,
    model_args: dict[str, Any],
    allow_pickle: bool,
    *,
    head_if_none: int | None,
) -> Backbone:
    source, folder = located.source, located.folder
    request = {} if image_size is None else {"img_size": image_size}
    overlay: dict[str, Any] = {"source": None}
    if folder is not None and source.pretrained:
        # timm loads exactly this file, strictly; left to itself it may prefer a pickle to a safetensors file
        overlay["file"] = str(find_weights(folder, source.model_id, "timm", allow_pickle))
    name = source.architecture if folder is None else f"local-dir:{folder}"
    try:
        args = resolve_model_input_args(name, request, **model_args)
        native: Any = timm.create_model(**args, pretrained=source.pretrained, pretrained_cfg_overlay=overlay)
        data = resolve_input_data_config(native, request)
    except _BUILD_ERRORS as error:
        raise _build_failure(source, folder, model_args, error) from error
    if getattr(native, "in_chans", 3) != 3:
        raise BackboneError(
            f"Model {source.model_id!r} takes images of {native.in_chans} channels; only RGB images (3) are "
            "supported. Leave in_chans out."
        )
    headless = native.num_classes < 1
    if headless and head_if_none is None:
        raise no_head(source.model_id, "has no classification head (num_classes is 0). Choose a model with one")
    if headless:
        native.reset_classifier(head_if_none)
    for key in ("file", "source"):  # the path is of this machine and has no place in an export
        native.pretrained_cfg.pop(key, None)
    preprocessing = Preprocessing(
        size=(int(data["input_size"][1]), int(data["input_size"][2])),
        mean=_triple(data["mean"]),
        std=_triple(data["std"]),
        crop_pct=float(data["crop_pct"]),
        crop_mode=str(data["crop_mode"]),
        interpolation=str(data["interpolation"]),
    )
    names = native.pretrained_cfg.pop("label_names", None)
    backbone = Backbone(native, source, preprocessing, _complete_names(names, native.num_classes))
    backbone.new_head = headless
    return backbone


def _build_transformers(
    located: LocatedModel,
    image_size: int | None,
    model_args: dict[str, Any],
    allow_pickle: bool,
    *,
    head_if_none: int | None,
) -> Backbone:
    from transformers import AutoConfig, AutoModelForImageClassification

    from arrest_hub.image_processor import load_processor, quiet_transformers

    source, folder = located.source, located.folder
    assert folder is not None  # a bare name is always timm's
    processor, preprocessing = load_processor(folder, source.model_id, image_size)
    saved_as = (located.config or {}).get("architectures") or [source.architecture]
    headless = saved_as[0] != source.architecture  # what `check_config` lets pass only where a head is put on
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if headless:
            config.num_labels = head_if_none
        if source.pretrained:
            weights = find_weights(folder, source.model_id, "transformers", allow_pickle)
            with quiet_transformers():
                native, info = AutoModelForImageClassification.from_pretrained(
                    folder,
                    config=config,
                    dtype=torch.float32,
                    use_safetensors=".safetensors" in weights.name,
                    weights_only=True,
                    local_files_only=True,
                    trust_remote_code=False,
                    ignore_mismatched_sizes=True,  # refused below, by name
                    output_loading_info=True,
                )
        else:
            native = AutoModelForImageClassification.from_config(config, dtype=torch.float32)
            info = {}
    except _BUILD_ERRORS as error:
        raise _build_failure(source, folder, model_args, error) from error
    # transformers starts what a file lacks from random numbers; keys it has no use for (a pooler) are harmless
    mismatched = [f"{key} is {tuple(a)}, not {tuple(b)}" for key, a, b in info.get("mismatched_keys", ())]
    if mismatched:
        raise _build_failure(source, folder, {}, ValueError("; ".join(sorted(mismatched)[:4]) + "."))
    missing = sorted(info.get("missing_keys", ()))
    if headless:
        new = tuple(f"{name}." for name in head_names(native, source))
        missing = [key for key in missing if not key.startswith(new)]
    if missing:
        raise BackboneError(
            f"The weights of model {source.model_id!r} lack {len(missing)} parameters of {source.architecture} "
            f"({', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}), which would be random numbers. "
            "Give a model finetuned for image classification, or save the weights again."
        )
    names = native.config.id2label
    if names is None:  # some of its models (PVT) have none of their own
        native.config.id2label = names = {i: f"LABEL_{i}" for i in range(native.config.num_labels)}
        native.config.label2id = {name: i for i, name in names.items()}
    if names == {i: f"LABEL_{i}" for i in range(len(names))}:
        names = None  # transformers' placeholder
    backbone = Backbone(native, source, preprocessing, _complete_names(names, native.config.num_labels), processor)
    backbone.new_head = headless
    return backbone


def _build_failure(
    source: ModelSource, folder: Path | None, model_args: Mapping[str, Any], error: BaseException
) -> BackboneError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    why = " ".join(lines[:3])
    why = why if len(why) <= 400 else why[:400] + " ..."
    why += "" if why.endswith((".", "...", "!")) else "."
    if folder is None:
        given = f" with model_args {dict(model_args)}" if model_args else ""
        return BackboneError(
            f"The timm architecture {source.architecture!r} cannot be built{given}: {why} "
            "Check model_args and the image size."
        )
    if any(isinstance(e, pickle.UnpicklingError) for e in (error, error.__cause__)):
        return BackboneError(
            f"Model {source.model_id!r} ({source.architecture}) cannot be loaded: its pickled weights are damaged "
            "or hold more than tensors, which is never executed. Convert the weights to safetensors."
        )
    return BackboneError(
        f"Model {source.model_id!r} ({source.architecture}) cannot be loaded: {why} "
        "Its weights are damaged, or do not belong to its config.json: download or export it again."
    )


def _parameters_behind(output: Tensor) -> set[Tensor]:
    """The leaves that ``output`` was computed from, found in autograd's graph without computing a gradient."""
    leaves, seen, waiting = set(), set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(node.variable)
        waiting += [after for after, _ in node.next_functions]
    return leaves


def _output_tensor(output: Any) -> Any:
    return output.logits if hasattr(output, "logits") else output


def _triple(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = tuple(values) * 3 if len(values) == 1 else values
    return float(red), float(green), float(blue)


def _complete_names(names: Any, count: int) -> list[str] | None:
    """Label names in the order of the classes, or None where not every class has one."""
    if isinstance(names, Mapping):
        named = {int(key): str(value) for key, value in names.items()}
        names = [named[i] for i in range(count)] if set(range(count)) <= set(named) else None
    if not names or len(names) != count:
        return None
    return [str(name) for name in names]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
