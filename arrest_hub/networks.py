"""A plain timm or transformers network from what `model_source.locate` found: built, its weights loaded, its
preprocessing and label names read."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import timm
import torch
from timm.data.model_config import resolve_input_data_config
from timm.models import resolve_model_input_args
from torch import nn

from arrest_hub.errors import BackboneError, causes
from arrest_hub.heads import head_names
from arrest_hub.model_config import no_head
from arrest_hub.model_source import LocatedModel, find_weights
from arrest_hub.transforms import Preprocessing


class BuiltNetwork(NamedTuple):
    """A network with what its files say of its images and classes."""

    network: Any
    preprocessing: Preprocessing
    label_names: list[str] | None
    new_head: bool
    """Whether the head came after the weights, at random."""
    processor: Any = None
    """The transformers image processor."""


def build_network(
    located: LocatedModel,
    image_size: int | None,
    model_args: dict[str, Any],
    allow_pickle: bool,
    head_if_none: int | None,
) -> BuiltNetwork:
    """The network on the CPU, in float32; ``head_if_none`` classes for one that has no head.

    Raises BackboneError for what is known of files that do not fit, and else what the libraries raise: anything, see
    `build_failure`.
    """
    build = _build_timm if located.source.library == "timm" else _build_transformers
    return build(located, image_size, model_args, allow_pickle, head_if_none)


def _build_timm(
    located: LocatedModel,
    image_size: int | None,
    model_args: dict[str, Any],
    allow_pickle: bool,
    head_if_none: int | None,
) -> BuiltNetwork:
    source, folder = located.source, located.folder
    asked = model_args.get("img_size") if image_size is None else image_size
    request = {} if asked is None else {"img_size": asked}
    overlay: dict[str, Any] = {"source": None}
    if folder is not None and source.pretrained:
        # timm loads exactly this file, strictly; left to itself it may prefer a pickle to a safetensors file
        overlay["file"] = str(find_weights(folder, source.model_id, "timm", allow_pickle))
    name = source.architecture if folder is None else f"local-dir:{folder}"
    args = resolve_model_input_args(name, request, **model_args)
    native: Any = timm.create_model(**args, pretrained=source.pretrained, pretrained_cfg_overlay=overlay)
    data = resolve_input_data_config(native, request)
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
    return BuiltNetwork(native, preprocessing, _complete_names(names, native.num_classes), new_head=headless)


def _build_transformers(
    located: LocatedModel,
    image_size: int | None,
    model_args: dict[str, Any],
    allow_pickle: bool,
    head_if_none: int | None,
) -> BuiltNetwork:
    from transformers import AutoConfig, AutoModelForImageClassification

    from arrest_hub.image_processor import load_processor, quiet_transformers

    source, folder = located.source, located.folder
    assert folder is not None  # a bare name is always timm's
    processor, preprocessing = load_processor(folder, source.model_id, image_size)
    saved_as = (located.config or {}).get("architectures") or [source.architecture]
    headless = saved_as[0] != source.architecture  # what `check_config` lets pass only where a head is put on
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    # what a config may ask for beside the logits, or in their place
    config.output_attentions, config.output_hidden_states, config.return_dict = False, False, True
    config.architectures = [source.architecture]  # of a type with several classifiers (DeiT) it chooses one
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
    # transformers starts what a file lacks from random numbers; keys it has no use for (a pooler) are harmless
    mismatched = [f"{key} is {tuple(a)}, not {tuple(b)}" for key, a, b in info.get("mismatched_keys", ())]
    if mismatched:
        raise ValueError("; ".join(sorted(mismatched)[:4]) + ".")
    _mend_momentum(native)
    missing = sorted(info.get("missing_keys", ()))
    if headless:
        new = tuple(f"{name}." for name in head_names(native, source))
        missing = [key for key in missing if not key.startswith(new)]
    if missing:
        raise BackboneError(
            f"The weights of model {source.model_id!r} lack {len(missing)} parameters of {source.architecture} "
            f"({', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}), which would not be trained. "
            "Give a model finetuned for image classification, or save the weights again."
        )
    names = native.config.id2label
    if names is None:  # some of its models (PVT) have none of their own
        native.config.id2label = names = {i: f"LABEL_{i}" for i in range(native.config.num_labels)}
        native.config.label2id = {name: i for i, name in names.items()}
    if names == {i: f"LABEL_{i}" for i in range(len(names))}:
        names = None  # transformers' placeholder
    label_names = _complete_names(names, native.config.num_labels)
    return BuiltNetwork(native, preprocessing, label_names, headless, processor)


def _mend_momentum(network: nn.Module) -> None:
    """transformers' MobileNetV1, MobileNetV2 and EfficientNet give BatchNorm TensorFlow's momentum (0.9997, 0.997,
    0.99), the share of the old statistics, where PyTorch wants that of the new: they would be the last batch's."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.momentum is not None and module.momentum > 0.5:
            module.momentum = 1 - module.momentum


def build_failure(
    located: LocatedModel, model_args: Mapping[str, Any], image_size: int | None, error: BaseException
) -> BackboneError:
    """What is said where a network cannot be built of its files, for images of ``image_size`` if that was asked for."""
    source = located.source
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    why = " ".join(lines[:3])
    why = why if len(why) <= 400 else why[:400] + " ..."
    why += "" if why.endswith((".", "...", "!")) else "."
    if located.folder is None:
        given = f" with model_args {dict(model_args)}" if model_args else ""
        return BackboneError(
            f"The timm architecture {source.architecture!r} cannot be built{given}: {why} "
            "Check model_args and the image size."
        )
    if model_args and isinstance(error, TypeError):
        return BackboneError(
            f"Model {source.model_id!r} ({source.architecture}) does not take model_args {dict(model_args)}: {why}"
        )
    if any(isinstance(e, pickle.UnpicklingError) for e in (error, error.__cause__)):
        return BackboneError(
            f"Model {source.model_id!r} ({source.architecture}) cannot be loaded: its pickled weights are damaged "
            "or hold more than tensors, which is never executed. Convert the weights to safetensors."
        )
    if any(isinstance(e, ImportError) for e in causes(error)):
        return BackboneError(
            f"Model {source.model_id!r} ({source.architecture}) needs a package that is not here: {why}"
        )
    if image_size is not None and "size mismatch" in str(error):
        return BackboneError(
            f"Model {source.model_id!r} ({source.architecture}) cannot be loaded for images of {image_size}x"
            f"{image_size} pixels: {why} Leave the image size out: its weights are for one size."
        )
    return BackboneError(
        f"Model {source.model_id!r} ({source.architecture}) cannot be loaded: {why} "
        "Its files are damaged, or do not belong together: download or export it again."
    )


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
