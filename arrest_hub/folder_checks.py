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


def class_names_in(files: Sequence[str], column: str) -> list[str] | None:
    """The class names that Parquet files themselves give to a column; None if they give none. `datasets` reads the
    files of all splits by the names of the first.

    Raises DataError if two of them number the classes otherwise.
    """
    names: list[str] | None = None
    for file in files:
        feature = Features.from_arrow_schema(pq.read_schema(file)).get(column)
        found = list(feature.names) if isinstance(feature, ClassLabel) else None
        if names is not None and found is not None and names != found:
            raise DataError(
                f"column {column!r} numbers its classes otherwise in {file} ({first_of(found)}) than in {files[0]} "
                f"({first_of(names)}). Write both with the same ClassLabel (Dataset.cast_column)."
            )
        names = names or found
    return names
