"""What `datasets` reads of a folder otherwise than its owner means it, without a word."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pyarrow.parquet as pq
from datasets import ClassLabel, DatasetBuilder, Features

from arrest_hub.errors import DataError

METADATA = {"metadata.csv", "metadata.jsonl"}
"""Files that give the labels of the images beside them."""


def first_of(names: Sequence[str]) -> str:
    """The first few of some names."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def is_metadata(file: str) -> bool:
    """Whether `datasets` takes a file for the labels of the images beside it, `METADATA` or a Parquet file like it."""
    return os.path.basename(file).lower() in METADATA | {"metadata.parquet"}


def check_metadata(builder: DatasetBuilder, files: list[str], typed: str) -> None:
    """Raises DataError if a split of images has none of the metadata that there is: `datasets` would take the splits
    for the classes."""
    found = [file for file in files if os.path.basename(file).lower() in METADATA]
    if not found or not hasattr(builder.config, "drop_labels"):  # the latter is of folders of images and their like
        return
    for split, parts in (builder.config.data_files or {}).items():
        if not any(os.path.basename(part).lower() in METADATA for part in parts):
            name = os.path.basename(found[0])
            raise DataError(
                f"dataset folder {typed!r}: {found[0]} is not read for the split {str(split)!r}, whose folder has "
                f"no {name} of its own. Put one into the folder of each split, with its own images and their paths "
                "from there."
            )


def check_classes(builder: DatasetBuilder, typed: str) -> None:
    """Raises DataError if two Parquet files number their classes otherwise: `datasets` reads all by the first one's."""
    if builder.name != "parquet":
        return
    seen: dict[str, tuple[str, list[str]]] = {}
    for parts in (builder.config.data_files or {}).values():
        for part in parts:
            for column, feature in Features.from_arrow_schema(pq.read_schema(part)).items():
                if not isinstance(feature, ClassLabel):
                    continue
                other, names = seen.setdefault(column, (part, feature.names))
                if names != feature.names:
                    raise DataError(
                        f"dataset folder {typed!r}: column {column!r} numbers its classes otherwise in "
                        f"{os.path.basename(other)} ({first_of(names)}) than in {os.path.basename(part)} "
                        f"({first_of(feature.names)}). Write both with the same ClassLabel (Dataset.cast_column)."
                    )
