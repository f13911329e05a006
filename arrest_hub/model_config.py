"""What a model's config.json says: which library and architecture, and whether that is an RGB image classifier.

Known from the file alone, so that what cannot be used is refused before any weights are downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from timm.models import is_model, list_models

import arrest_hub.architectures  # noqa: F401  (registers the CIFAR architectures in timm)
from arrest_hub.errors import BackboneError, did_you_mean, first_line


def read_config(file: Path, model_id: str) -> dict[str, Any]:
    """A model folder's config.json; BackboneError if it is not an object in JSON."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # malformed JSON or not UTF-8
        raise BackboneError(
            f"The config.json of model {model_id!r} cannot be read ({error}). Download or export it again."
        ) from error
    if not isinstance(config, dict):
        raise BackboneError(
            f"The config.json of model {model_id!r} holds a {type(config).__name__}, not an object. "
            "Give a config.json written by timm or transformers."
        )
    if isinstance(named := config.get("architectures"), str):
        config["architectures"] = [named]
    return config


def check_config(config: Mapping[str, Any], model_id: str, *, head_wanted: bool = True) -> tuple[str, str]:
    """(library, architecture) of an image classifier's config.json; BackboneError for anything else.

    Without ``head_wanted`` a network without a head serves too: of a transformers one, such as a ViTModel, the
    architecture is the classifier that is made of it.
    """
    try:
        return _check_config(config, model_id, head_wanted)
    except (TypeError, KeyError, AttributeError) as error:  # of a value that is of another type than it should be
        raise BackboneError(
            f"The config.json of model {model_id!r} is damaged ({type(error).__name__}: {first_line(error)}). Download "
            "or export the model again."
        ) from error


def _check_config(config: Mapping[str, Any], model_id: str, head_wanted: bool) -> tuple[str, str]:
    if config.get("model_type") == "timm_wrapper":
        raise BackboneError(
            f"Model {model_id!r} is a timm model wrapped by transformers (model_type 'timm_wrapper'). "
            "Give the timm model itself, such as 'timm/resnet50.a1_in1k'."
        )
    if "architecture" in config:
        return "timm", _check_timm_config(config, model_id, head_wanted)
    if "model_type" in config or "architectures" in config:
        return "transformers", _check_transformers_config(config, model_id, head_wanted)
    raise BackboneError(
        f"The config.json of model {model_id!r} has neither 'architecture' (timm) nor 'model_type' "
        "(transformers). Give an image classifier saved by one of the two."
    )


def _check_timm_config(config: Mapping[str, Any], model_id: str, head_wanted: bool) -> str:
    architecture = config["architecture"]
    if not isinstance(architecture, str) or not is_model(architecture):
        raise BackboneError(
            f"Model {model_id!r} has the architecture {architecture!r}, which timm {timm.__version__} does not "
            f"have.{did_you_mean(str(architecture), list_models())} Upgrade timm, or import the module that "
            "registers it."
        )
    cfg = config.get("pretrained_cfg", config)
    args = config.get("model_args") or {}
    if not isinstance(cfg, dict) or not isinstance(args, dict):
        raise BackboneError(
            f"The config.json of model {model_id!r} is damaged: 'pretrained_cfg' and 'model_args' must be "
            "objects. Export the model again with timm's save_for_hf(..., safe_serialization=True)."
        )
    classes = args.get("num_classes", config.get("num_classes", cfg.get("num_classes", 1000)))
    if classes == 0 and head_wanted:
        raise no_head(model_id, "has no classification head (num_classes is 0). Choose a model with one")
    _check_classes_and_channels(
        model_id,
        1 if classes == 0 else classes,
        args.get("in_chans") or (cfg.get("input_size") or [3])[0],
        "num_classes",
    )
    return architecture


def _check_transformers_config(config: Mapping[str, Any], model_id: str, head_wanted: bool) -> str:
    if config.get("auto_map"):
        raise BackboneError(
            f"Model {model_id!r} runs Python code from its repository (auto_map in config.json), which is never "
            "executed here. Use a model whose architecture is part of transformers or timm."
        )
    try:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    except ModuleNotFoundError as error:
        raise BackboneError(
            f"Model {model_id!r} is a transformers model, and transformers is not installed. "
            'Run: pip install "arrest-hub[transformers]"'
        ) from error
    model_type: Any = config.get("model_type")
    if model_type not in CONFIG_MAPPING_NAMES:
        raise BackboneError(
            f"Model {model_id!r} has model_type {model_type!r}, which this version of transformers does not "
            f"have.{did_you_mean(str(model_type), CONFIG_MAPPING_NAMES)} Upgrade transformers."
        )
    classifiers = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.get(model_type, ())
    classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers
    if config.get("quantization_config"):
        raise BackboneError(
            f"Model {model_id!r} has quantized weights (quantization_config in config.json), which cannot be trained. "
            "Give the model that it was made of."
        )
    saved_as = config.get("architectures") or classifiers[:1]
    if not saved_as or not classifiers:
        raise BackboneError(
            f"Model {model_id!r} is a {saved_as[0] if saved_as else model_type}, not an image classifier. Choose one."
        )
    headless = saved_as[0] not in classifiers
    if headless and head_wanted:
        wanted = f"is a {saved_as[0]}, without a classification head. Choose a {classifiers[0]}"
        raise no_head(model_id, wanted)
    named = config.get("id2label")  # transformers takes null for none
    classes = config.get("num_labels", 2) if named is None else len(named)
    channels = config.get("num_channels", (config.get("vision_config") or {}).get("num_channels", 3))
    _check_classes_and_channels(model_id, 1 if headless else classes, channels, "num_labels")
    return str(classifiers[0] if headless else saved_as[0])


def no_head(model_id: str, what: str) -> BackboneError:
    """The error for a network without a head where one is wanted; ``what`` it is, and what to choose instead."""
    return BackboneError(
        f"Model {model_id!r} {what}, or have arrest-finetune train one first with --standard-epochs N (from Python, "
        "num_classes=N puts on a random one)."
    )


def _check_classes_and_channels(model_id: str, classes: Any, channels: Any, key: str) -> None:
    if not isinstance(classes, int) or classes < 1:
        raise BackboneError(
            f"Model {model_id!r} has no classification head ({key} is {classes}). Choose a model with one."
        )
    if channels != 3:
        raise BackboneError(
            f"Model {model_id!r} takes images of {channels} channels; only RGB images (3) are supported. "
            "Choose a model for RGB images."
        )
