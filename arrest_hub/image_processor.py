"""What a transformers image processor does to an image, as a ``Preprocessing``.

The processor's attributes are read, and then it is tried on plain images, and on smooth ones of several shapes beside
the evaluation transform that is made of them: one that does anything else is refused, rather than evaluated on the
wrong pixels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from arrest_hub.errors import BackboneError, first_line
from arrest_hub.model_source import preprocessor_files
from arrest_hub.transforms import Preprocessing, eval_transform

_INTERPOLATION = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL's numbers


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers draws a bar for every load and save, also of a few tensors; a run has a bar of its own. It reports
    weights that a model has no use for, or lacks: what that means for a run is said, or refused, by its caller."""
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(max(verbosity, logging.ERROR))
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def load_processor(folder: Path, model_id: str, image_size: int | None = None) -> tuple[Any, Preprocessing]:
    """The image processor saved in ``folder``, for ``image_size`` pixels if given, and what it does.

    Raises BackboneError without a processor, or for one whose work cannot be reproduced.
    """
    from transformers import AutoImageProcessor

    if not preprocessor_files(folder):
        raise BackboneError(
            f"Model {model_id!r} has no preprocessor_config.json, so the size and normalisation of its images "
            "are unknown. Save its image processor beside it: processor.save_pretrained(folder)."
        )
    if code := _custom_code(folder):
        raise BackboneError(
            f"Model {model_id!r} prepares images by Python code from its repository ({code}), which is never executed "
            "here. Save an image processor of transformers beside it."
        )
    try:
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # over a damaged file, anything
        raise BackboneError(
            f"The image processor of model {model_id!r} cannot be loaded ({first_line(error)}). "
            "Save it again with processor.save_pretrained(folder)."
        ) from error
    if image_size is not None:
        _resize_processor(processor, image_size)
    try:
        return processor, read_preprocessing(processor)
    except ValueError as error:
        raise BackboneError(
            f"The image processor of model {model_id!r} ({type(processor).__name__}) {error}. "
            "Use another model, or save an image processor that only resizes, crops and normalises."
        ) from error


def _custom_code(folder: Path) -> str | None:
    """What a saved processor names as its own code: transformers would silently take the architecture's instead."""
    for file in preprocessor_files(folder):
        with suppress(ValueError):  # a damaged file is AutoImageProcessor's to report
            config = json.loads(file.read_text(encoding="utf-8"))
            named = config.get("auto_map") if isinstance(config, dict) else None
            if named and ("AutoImageProcessor" in named or "AutoFeatureExtractor" in named):
                return f"auto_map in {file.name}"
    return None


def read_preprocessing(processor: Any) -> Preprocessing:
    """Resize, crop, interpolation, mean and std of ``processor``; ValueError for what has no equivalent."""
    black, white, mixed = (_apply(processor, np.full((64, 64, 3), c, np.uint8)) for c in (0, 255, (51, 102, 204)))
    height, width = black.shape[-2:]
    black, white, mixed = (a[:, height // 2, width // 2] for a in (black, white, mixed))
    if not np.all(np.isfinite(black)) or np.any(white == black):
        raise ValueError("gives the same output for black and white")
    # the processor is affine in the pixel: out = (x - mean) / std with x in [0, 1]
    std = 1.0 / (white - black)
    mean = -black * std
    if not np.allclose(mixed, (np.array([0.2, 0.4, 0.8]) - mean) / std, atol=1e-3):
        raise ValueError("mixes or reorders the colour channels")
    stated = _stated_normalisation(processor)
    if stated is not None and np.allclose([mean, std], stated, atol=1e-5):
        mean, std = np.array(stated)  # exact, where the measurement carries a rounding error
    crop_mode, edge = _resize_rule(processor)
    crop_pct = _fraction(height, edge)
    across = _sizes(processor, "size").get("width")
    if crop_mode == "squash" and across is not None and math.floor(width / crop_pct) != across:
        raise ValueError(f"resizes to {edge}x{across} before it crops {height}x{width}, which is no enlargement of it")
    wants = Preprocessing(
        size=(height, width),
        mean=(float(mean[0]), float(mean[1]), float(mean[2])),
        std=(float(std[0]), float(std[1]), float(std[2])),
        crop_pct=crop_pct,
        crop_mode=crop_mode,
        interpolation=_interpolation(processor),
        floor_crop=True,
    )
    _check_pixels(processor, wants)
    return wants


def _apply(processor: Any, image: np.ndarray) -> np.ndarray:
    """uint8 image [H, W, 3] -> what the model gets, float64 [3, H', W']. Raises ValueError where there is no such."""
    try:
        given = processor(images=image, return_tensors="np")
    except Exception as error:
        raise ValueError(f"fails on an image ({first_line(error)})") from error
    if "pixel_values" not in given:
        raise ValueError(f"makes {', '.join(given)} of an image instead of pixel values")
    out = np.asarray(given["pixel_values"], dtype=np.float64)
    if out.ndim != 4 or out.shape[:2] != (1, 3):
        raise ValueError(f"gives arrays of shape {out.shape} instead of one image of 3 channels")
    return out[0]


def _stated_normalisation(processor: Any) -> tuple[list[float], list[float]] | None:
    if not getattr(processor, "do_normalize", False):
        return [0.0] * 3, [1.0] * 3
    mean, std = (getattr(processor, name, None) for name in ("image_mean", "image_std"))
    if mean is None or std is None:
        return None
    return [float(v) for v in np.broadcast_to(mean, 3)], [float(v) for v in np.broadcast_to(std, 3)]


def _sizes(processor: Any, name: str) -> dict[str, int]:
    size = getattr(processor, name, None)
    keys = ("height", "width", "shortest_edge", "longest_edge")
    if size is None:
        return {}
    get = size.get if hasattr(size, "get") else lambda key: getattr(size, key, None)
    return {key: int(value) for key in keys if (value := get(key)) is not None}


def _resize_rule(processor: Any) -> tuple[str, int]:
    """(crop mode, height in pixels after the resize and before the crop)."""
    if not getattr(processor, "do_resize", False):
        raise ValueError("does not resize images (do_resize is false)")
    size = _sizes(processor, "size")
    if "shortest_edge" in size and "longest_edge" not in size:
        edge = size["shortest_edge"]
        if type(processor).__name__.startswith("ConvNext") and edge >= 384:
            return "squash", edge
        if getattr(processor, "crop_pct", None):
            edge = int(edge / processor.crop_pct)
        elif type(processor).__name__.startswith("Levit"):
            edge = int(256 / 224 * edge)
        return "center", edge
    if "height" in size and "width" in size:
        return "squash", size["height"]
    raise ValueError(f"resizes in a way that is not supported (size {size})")


def _fraction(size: int, edge: int) -> float:
    """crop_pct such that floor(size / crop_pct), timm's rule for the resize, is exactly ``edge``."""
    fraction = size / edge
    while math.floor(size / fraction) < edge:
        fraction = math.nextafter(fraction, 0.0)
    return fraction


def _check_pixels(processor: Any, wants: Preprocessing) -> None:
    """ValueError unless images of several shapes come out of ``processor`` as out of the evaluation transform."""
    transform = eval_transform(wants)
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8))
    mean, std = (np.array(values)[:, None, None] for values in (wants.mean, wants.std))
    tolerance = 0.03 if wants.interpolation == "nearest" else 0.004  # half a level of rounding; ties of "nearest"
    for width, height in ((160, 100), (100, 161), (41, 40), (333, 251)):
        image = coarse.resize((width, height), Image.Resampling.BICUBIC)
        given = _apply(processor, np.array(image)) * std + mean
        if given.shape[1:] != wants.size:
            raise ValueError(
                f"gives images of different sizes ({wants.size[0]}x{wants.size[1]} of a square one, {given.shape[1]}x"
                f"{given.shape[2]} of one of {height}x{width}): its do_center_crop would have to be true"
            )
        error = float(np.abs(given - transform(image).numpy() / 255).mean())
        if error > tolerance:
            raise ValueError(
                f"does more than its settings tell, or pads: of an image of {height}x{width} it shows other pixels "
                f"than resize and crop ({wants.crop_mode}, {wants.crop_pct:.3f}) give, by {error:.3f} in [0, 1]"
            )


def _interpolation(processor: Any) -> str:
    resample = getattr(processor, "resample", None)
    name = getattr(resample, "value", resample)  # PIL's enum holds a number, torchvision's a name
    name = _INTERPOLATION.get(name, name) if isinstance(name, int) else name
    if name not in _INTERPOLATION.values():
        raise ValueError(f"uses the interpolation {resample!r}, which is not supported")
    return str(name)


def _resize_processor(processor: Any, pixels: int) -> None:
    """Make ``processor`` give square images of ``pixels``, keeping the ratio of resize to crop."""
    size, crop = _sizes(processor, "size"), _sizes(processor, "crop_size")
    cropped = bool(getattr(processor, "do_center_crop", False)) and "height" in crop
    old = crop["height"] if cropped else size.get("height", size.get("shortest_edge", pixels))
    processor.size = type(processor.size)(**{k: round(v * pixels / old) for k, v in size.items()})
    if cropped:
        processor.crop_size = type(processor.crop_size)(height=pixels, width=pixels)
