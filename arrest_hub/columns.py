"""Which column holds the image and which the label, found from the features of a dataset."""

from __future__ import annotations

import textwrap
from typing import Any, NamedTuple

from datasets import ClassLabel, Image, Value

from arrest_hub.errors import DataError, did_you_mean

IMAGE_NAMES = ("image", "img", "images", "pixel", "pixels", "pixel_values", "picture", "png", "jpg", "jpeg", "webp")
LABEL_NAMES = ("label", "labels", "fine_label", "class", "classes", "target", "targets", "category", "cls", "y")


class Columns(NamedTuple):
    """Two column names."""

    image: str
    label: str


def find_columns(dataset: Any, image_column: str | None, label_column: str | None, dataset_id: str) -> Columns:
    """The image and the label column of a `datasets` split; what the user named is checked, not replaced.

    Images: feature Image, or a column of encoded bytes under a usual name. Labels: feature ClassLabel, or integers,
    booleans or strings under a usual name. Of several, the one with the most usual name. Raises DataError when there is
    none, or more than one where no sure type (Image, ClassLabel) has a usual name.
    """
    features = dataset.features
    if not features:
        raise DataError(
            f"dataset {dataset_id!r} says nothing about its columns: it is empty, or a stream of a format without "
            "types. Choose another split, or leave out --streaming."
        )
    image = _choose(features, image_column, dataset_id, "image", "--image-column", IMAGE_NAMES, _is_image, _is_encoded)
    label = _choose(
        features, label_column, dataset_id, "label", "--label-column", LABEL_NAMES, _is_class_label, _is_plain_label
    )
    return Columns(image, label)


_TAKEN = {
    "image": "Taken are images, or bytes that encode them",
    "label": "Taken are whole numbers, booleans, strings or a ClassLabel",
}


def _choose(
    features: Any, typed: str | None, dataset_id: str, kind: str, flag: str, usual: tuple, sure: Any, possible: Any
) -> str:
    columns = ", ".join(features)
    if typed is not None:
        if typed not in features:
            raise DataError(
                f"dataset {dataset_id!r} has no column {typed!r} ({flag}); it has {columns}."
                + did_you_mean(typed, features)
            )
        if not (sure(features[typed]) or possible(features[typed])):
            raise DataError(
                f"dataset {dataset_id!r}: column {typed!r} ({flag}) holds no {kind}s but {features[typed]}. "
                f"Choose another of {columns}."
            )
        return typed
    candidates = [name for name in features if sure(features[name])]
    named = [name for name in features if name.lower() in usual and (sure(features[name]) or possible(features[name]))]
    if set(named) & set(candidates):
        # of several classifications (fine and coarse, say) only a usual name is a safe choice
        candidates = [min(named, key=lambda name: usual.index(name.lower()))]
    else:  # a usual name is as good a reason as a sure type
        candidates += named
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise DataError(
            f"dataset {dataset_id!r} has several {kind} columns: {', '.join(candidates)}. Choose one with {flag}."
        )
    typed_columns = ", ".join(f"{name} ({textwrap.shorten(str(feature), 60)})" for name, feature in features.items())
    raise DataError(
        f"dataset {dataset_id!r} has no {kind} column that can be recognised; it has {typed_columns}. {_TAKEN[kind]}. "
        f"Name it with {flag}, if it goes by another name."
    )


def _is_image(feature: Any) -> bool:
    return isinstance(feature, Image)


def _is_encoded(feature: Any) -> bool:
    """Encoded images without the Image feature: bytes, or a struct with bytes."""
    if isinstance(feature, dict):
        return "bytes" in feature and set(feature) <= {"bytes", "path"}
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def _is_class_label(feature: Any) -> bool:
    return isinstance(feature, ClassLabel)


def _is_plain_label(feature: Any) -> bool:
    dtype = feature.dtype if isinstance(feature, Value) else ""
    return dtype.startswith(("int", "uint")) or dtype in ("bool", "string", "large_string")
