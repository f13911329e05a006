"""Any timm or transformers image classifier behind one interface: pixels in, logits and representation out.

The library's classifier is taken out of its network and kept beside it. The network then ends with the
classifier's input, the representation, so one pass gives both, without hooks; ``Backbone.native`` puts the
classifier back for saving.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from arrest_hub.caller import as_by_default
from arrest_hub.errors import ArrestError, BackboneError, first_line
from arrest_hub.heads import ClassificationHead, Slot, head_names, reset_timm_head, reset_transformers_head
from arrest_hub.model_arguments import DROPPED, model_args_problem
from arrest_hub.model_source import ModelSource, locate
from arrest_hub.networks import build_failure, build_network
from arrest_hub.transforms import Preprocessing

__all__ = ["Backbone", "BackboneOutput", "ModelSource", "load_backbone"]


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
        self.channels_last = False  # whether pixels are laid out so
        self.foldable_pairs: dict[str, str] | None = None  # by `foldable`, once it was asked; copies have them too
        self.processor = processor  # the transformers image processor, written back by export
        self.body = native
        self._head_names = head_names(native, source)
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).view(1, 3, 1, 1), persistent=False)
        self.num_features = 0
        self.new_head = False  # whether the head came after the weights, at random
        self.num_classes = 0
        self._dropout_name: str | None = None
        self._drop_rate = 0.0  # of a dropout that is no module, and is the head's now
        self.head = ClassificationHead([self.body.get_submodule(name) for name in self._head_names])
        self.eval()
        self._self_check()

    def normalize(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1], [B, 3, H, W] -> the native network's input."""
        return (pixels - self.mean) / self.std

    def forward(self, pixels: Tensor) -> BackboneOutput:
        """Float images [B, 3, H, W] in [0, 1] -> logits and representation, in one pass.

        Raises BackboneError for whole numbers, which would be taken for pixels far outside [0, 1].
        """
        if not pixels.is_floating_point():
            raise BackboneError(f"pixels of type {pixels.dtype}: give floats in [0, 1], such as images / 255.")
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        normalized = self.normalize(pixels).contiguous(memory_format=layout)
        representation = _output_tensor(self.body(normalized)).flatten(1)
        return BackboneOutput(self.head(representation), representation)

    @contextmanager
    def native(self) -> Iterator[Any]:
        """The plain timm or transformers network with its head in place; ``forward`` must wait meanwhile."""
        for name, classifier in zip(self._head_names, self.head.classifiers, strict=True):
            self.body.set_submodule(name, classifier)
        if self._dropout_name is not None:
            self.body.set_submodule(self._dropout_name, self.head.dropout)
        network: Any = self.body
        if self._drop_rate:
            network.drop_rate = self._drop_rate
        try:
            yield network
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
                reset_timm_head(network, self._head_names, count)
                for key in ("label_names", "label_descriptions"):  # of the classes before
                    network.pretrained_cfg.pop(key, None)
            else:
                reset_transformers_head(network, self._head_names, count, names)
        self.head.train(self.training)
        self.label_names = names
        self.new_head = True
        self.num_classes = count

    def _take_head_out(self) -> None:
        count = len(self._head_names)
        for index, name in enumerate(self._head_names):
            self.head.classifiers[index] = self.body.get_submodule(name)
            self.body.set_submodule(name, nn.Identity() if count == 1 else Slot(index, count, self.head.widths))
        if self._dropout_name is not None:
            dropout: Any = self.body.get_submodule(self._dropout_name)
            dropout.inplace = False  # or it would be done to the representation, which is given out
            self.head.dropout = dropout
            self.body.set_submodule(self._dropout_name, nn.Identity())
        if self._drop_rate:
            network: Any = self.body
            network.drop_rate = 0.0

    def _last_dropout(self, normalized: Tensor) -> str | None:
        """The name of the dropout between representation and head, if there is one, which in eval mode gives back what
        it is given (it may be flattened then). It goes with the head: what a student drops at random is no distance
        from its teacher."""
        candidates = {
            name: module
            for name, module in self.body.named_modules()
            if isinstance(module, nn.Dropout) and module.p > 0
        }
        if not candidates:
            return None
        outputs: dict[str, tuple[Tensor, int]] = {}

        def keep(name: str, output: Tensor) -> None:
            outputs[name] = output, output._version

        hooks = [
            module.register_forward_hook(lambda _module, _input, output, name=name: keep(name, output))
            for name, module in candidates.items()
        ]
        try:
            with torch.no_grad():
                representation = _output_tensor(self.body(normalized))
        finally:
            for hook in hooks:
                hook.remove()
        found = [
            name for name, (output, version) in outputs.items()
            if output.data_ptr() == representation.data_ptr() and output.numel() == representation.numel()
            and representation._version == version  # nothing was done to it in place since
        ]  # fmt: skip
        return found[-1] if found else None

    def _last_drop_rate(self, normalized: Tensor) -> float:
        """The rate of a dropout between representation and head that is no module but the network's own doing, by its
        `drop_rate` (timm's ResNets, EfficientNets, GhostNets); 0 if there is none, or if it is not the last thing done.
        """
        rate = getattr(self.body, "drop_rate", 0.0)
        if not isinstance(rate, (int, float)) or not 0 < rate < 1:
            return 0.0
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            kept = _output_tensor(self.body(normalized)) / (1 - rate)
            self.body.training = True  # and nothing in it
            try:
                dropped = _output_tensor(self.body(normalized))
            finally:
                self.body.training = False
        if not isinstance(dropped, Tensor) or dropped.shape != kept.shape:
            return 0.0
        stays = dropped != 0
        alike = torch.allclose(dropped[stays], kept[stays], rtol=1e-4, atol=1e-6)
        return float(rate) if alike and bool((kept[~stays] != 0).any()) else 0.0

    def _stays_separable(self, pixels: Tensor) -> bool:
        """Whether the logits stay the native network's when parameters beside the head are trained: EfficientViM
        weighs its heads alike at the beginning, which hides that it weighs them."""
        above = {".".join(name.split(".")[:depth]) for name in self._head_names for depth in range(name.count(".") + 1)}
        beside = [
            parameter for name in above for parameter in self.body.get_submodule(name).parameters(recurse=False)
            if parameter.ndim < 2
        ]  # fmt: skip
        if not beside:
            return True
        changed = [*beside, *self.head.parameters()]
        before = [parameter.detach().clone() for parameter in changed]
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            try:
                for parameter in changed:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
                logits = self(pixels).logits
                with self.native() as network:
                    expected = _output_tensor(network(self.normalize(pixels)))
            finally:
                for parameter, value in zip(changed, before, strict=True):
                    parameter.copy_(value)
        return _same_logits(logits, expected)

    def _self_check(self) -> None:
        """Compare with the native network's own logits; sets ``num_features`` and ``num_classes``.

        Parameters that the logits do not depend on (a mask token, an unused pooler) are frozen:
        DistributedDataParallel would wait for their gradients.
        """
        generator = torch.Generator().manual_seed(0)
        where = f"{self.source.architecture} (model {self.source.model_id!r})"
        try:
            pixels = torch.rand(2, 3, *self.preprocessing.size, generator=generator)
            with torch.no_grad(), self.native() as network:
                expected = _output_tensor(network(self.normalize(pixels)))
        except (RuntimeError, ValueError, AssertionError, TypeError, AttributeError) as error:
            height, width = self.preprocessing.size
            raise BackboneError(
                f"{where} cannot process an image of {height}x{width} pixels ({first_line(error)}). "
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
        try:
            last_dropout = self._last_dropout(self.normalize(pixels))
            drop_rate = 0.0 if last_dropout else self._last_drop_rate(self.normalize(pixels))
            with self.native():
                self._dropout_name, self._drop_rate = last_dropout, drop_rate
            if drop_rate:
                self.head.dropout = nn.Dropout(drop_rate)
            # some networks (LeViT) keep in eval mode what they computed from their weights, here without a gradient,
            # until they leave it
            self.train().eval()
            with torch.enable_grad():
                logits, representation = self(pixels)
            same = _same_logits(logits, expected) and self._stays_separable(pixels)
        except (RuntimeError, ValueError, AssertionError, TypeError, AttributeError) as error:
            raise inseparable from error
        if not same:
            raise inseparable
        self.num_features = representation.shape[1]
        self.num_classes = logits.shape[1]
        used = _parameters_behind(logits)
        for parameter in self.parameters():
            if parameter.requires_grad:
                parameter.requires_grad_(parameter in used)
        self.train().eval()


@as_by_default()
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
    own; ``model_args`` are timm's keyword arguments for a bare architecture name, or those of its dropout for any timm
    model (`DROPPED`).
    Weights are safetensors; ``allow_pickle`` admits pickles, read by torch.load(weights_only=True).

    Loading weights leaves the global random generator as it was; a random initialisation draws from it.
    Raises BackboneError, or HubError when the Hub cannot serve the model.
    """
    if not isinstance(model_id, (str, os.PathLike)):
        raise BackboneError(f"model_id is a {type(model_id).__name__}: give a name such as 'timm/resnet50.a1_in1k'.")
    model_id = os.fspath(model_id)
    if not model_id:
        raise BackboneError("The model id is empty. Give one such as 'timm/resnet50.a1_in1k'.")
    for name, value in (("num_classes", num_classes), ("head_if_none", head_if_none), ("image_size", image_size)):
        if value is not None and not (isinstance(value, Integral) and value >= 1):
            raise BackboneError(f"{name} is {value!r} for model {model_id!r}; it must be a positive whole number.")
    if problem := model_args_problem(model_args or {}):
        raise BackboneError(f"model_args {problem}")
    asked = (model_args or {}).get("img_size", image_size)
    if image_size is not None and asked not in (image_size, (image_size, image_size), [image_size, image_size]):
        raise BackboneError(f"image_size {image_size} and model_args img_size {asked} are two sizes: give one.")
    count_if_none = num_classes or head_if_none
    located = locate(
        model_id, revision=revision, pretrained=pretrained, head_wanted=count_if_none is None,
        allow_pickle=allow_pickle, cache_dir=cache_dir,
    )  # fmt: skip
    args: dict[str, Any] = dict(model_args or {})
    if located.folder is not None and (located.source.library != "timm" or not set(args) <= DROPPED) and args:
        raise BackboneError(
            f"model_args {args} were given for model {model_id!r}, whose architecture its config.json fixes. Give them "
            f"with a bare timm architecture name, or leave them out; of a timm model {', '.join(sorted(DROPPED))} may "
            "be chosen."
        )
    if located.folder is None and num_classes is not None:
        args.setdefault("num_classes", num_classes)
    # what the libraries draw before they load weights leaves no trace
    try:
        with torch.random.fork_rng(devices=[], enabled=located.source.pretrained):
            built = build_network(located, image_size, args, allow_pickle, count_if_none)
            backbone = Backbone(built.network, located.source, built.preprocessing, built.label_names, built.processor)
    except ArrestError:
        raise
    except Exception as error:
        raise build_failure(located, args, image_size, error) from error
    backbone.new_head = built.new_head
    if num_classes is not None and backbone.num_classes != num_classes:
        backbone.reset_head(num_classes)
    return backbone


def _same_logits(logits: Tensor, expected: Tensor) -> bool:
    """But for rounding."""
    scale = max(1.0, expected.abs().max().item())
    return logits.shape == expected.shape and torch.allclose(logits, expected, rtol=1e-4, atol=1e-4 * scale)


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
