"""A source whose columns and classes are settled: its splits, and which of them can be used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Image, IterableDataset

from arrest_hub.columns import Columns, find_columns
from arrest_hub.errors import DataError
from arrest_hub.folder_checks import class_names_in, first_of
from arrest_hub.image_folder import KNOWN_SPLITS
from arrest_hub.sources import RawSplit, Source
from arrest_hub.subsets import ImageSplit, read_column


class OtherClasses(DataError):
    """The labels of a split mean other things than the dataset's; ``some``: but not all of them."""

    def __init__(self, message: str, some: bool = False) -> None:
        super().__init__(message)
        self.some = some


@dataclass
class LabelledSource:
    """A source whose columns and classes are settled: they are those of its split ``origin``."""

    source: Source
    dataset_id: str
    origin: str
    columns: Columns
    class_names: list[str] | None
    num_classes: int

    def split(self, name: str) -> ImageSplit:
        """One split, without the other columns.

        Raises DataError when it is empty or lacks one of the two, OtherClasses when it has other classes.
        """
        dataset, columns = self.source.splits[name], self.columns
        if isinstance(dataset, Dataset) and len(dataset) == 0:
            raise DataError(f"dataset {self.dataset_id!r}: split {name!r} is empty. Choose another split.")
        missing = [c for c in columns if c not in (dataset.column_names or columns)]
        if missing:
            raise DataError(
                f"dataset {self.dataset_id!r}: split {name!r} has no column {missing[0]!r}, which {self.origin!r} has. "
                "Choose another split with --eval-split."
            )
        codes = self._codes(name)
        dataset = dataset.select_columns(list(columns)).cast_column(columns.image, Image(decode=False))
        size = self.source.sizes.get(name) if isinstance(dataset, IterableDataset) else None
        made = ImageSplit(dataset, columns.image, columns.label, name, self.num_classes, size, codes)
        made.by_shard = made.streaming
        return made

    def _codes(self, name: str) -> Mapping[Any, int] | None:
        """What is in the label column of a split -> the dataset's label; None where it is the label already.

        Every split says itself which class its numbers mean, and not all do it alike. Raises OtherClasses where a split
        has classes that the dataset does not know.
        """
        dataset, column, names = self.source.splits[name], self.columns.label, self.class_names
        feature = (dataset.features or {}).get(column)
        if feature is None:  # a stream that does not say
            return None
        own_kind, kind = label_kind(feature), label_kind((self.source.splits[self.origin].features or {}).get(column))
        kinds = {own_kind, kind}
        if not (kinds <= {"classes", "strings"} or kinds <= {"classes", "numbers"}):
            raise OtherClasses(
                f"dataset {self.dataset_id!r}: column {column!r} of split {name!r} holds {own_kind}, and not {kind} as "
                f"that of {self.origin!r}. Choose another split, or give the column the same type in both."
            )
        if own_kind == "strings":
            return {value: label for label, value in enumerate(names or [])}
        if names is None or kinds != {"classes"}:
            return None
        own = class_names_in(self.source.parquet.get(name, ()), column) or feature.names
        index = {value.casefold(): label for label, value in enumerate(names)}
        known = {number: index.get(value.casefold()) for number, value in enumerate(own)}
        if len(index) < len(names):  # names that differ in their case alone
            known = {number: names.index(value) if value in names else None for number, value in enumerate(own)}
        unknown = {number for number, label in known.items() if label is None}
        if unknown and isinstance(dataset, Dataset):
            unknown &= set(read_column(dataset, column).unique().to_pylist())
        if unknown:
            raise OtherClasses(
                f"dataset {self.dataset_id!r}: split {name!r} has classes that {self.origin!r} lacks: "
                f"{first_of([repr(own[number]) for number in sorted(unknown)])}; {self.origin!r} has "
                f"{first_of(list(map(repr, names)))}. Name the classes alike in both, or choose another split.",
                some=len(unknown) < len(own),
            )
        codes = {number: label for number, label in known.items() if label is not None}
        return None if all(number == label for number, label in codes.items()) else codes

    def shortcoming(self, name: str) -> str | None:
        """Why a split cannot be used, if it has no labels; of a stream only the first few are read."""
        dataset, label = self.source.splits[name], self.columns.label
        if isinstance(dataset, Dataset) and len(dataset) == 0:
            return "it is empty"
        missing = [c for c in self.columns if c not in (dataset.column_names or self.columns)]
        if missing:
            return f"it has no column {missing[0]!r}"
        if isinstance(dataset, Dataset):
            column = read_column(dataset, label)
            found = column.unique().to_pylist()
            labelled = not column.null_count and -1 not in found
            strings = label_kind(dataset.features[label]) == "strings"
            if labelled and strings and not set(found) & set(self.class_names or ()):
                return f"none of its labels, such as {found[0]!r}, is a class of {self.origin!r}"
        else:
            head = list(dataset.select_columns([label]).take(8))
            if not head:
                return "it is empty"
            labelled = all(row[label] not in (None, -1) for row in head)
        return None if labelled else "its labels are missing or -1"


def settle_columns(
    source: Source, dataset_id: str, origin: str, image_column: str | None, label_column: str | None
) -> LabelledSource:
    """Columns and classes from the split ``origin``. Raises DataError when they cannot be told."""
    raw = source.splits[origin]
    columns = find_columns(raw, image_column, label_column, dataset_id)
    return LabelledSource(source, dataset_id, origin, columns, *_classes(raw, columns.label, dataset_id))


def label_kind(feature: Any) -> str:
    """What a label column holds: "classes" (feature ClassLabel with names), "strings", "numbers", or its feature."""
    if isinstance(feature, ClassLabel):
        return "numbers" if feature.names == [str(number) for number in range(feature.num_classes)] else "classes"
    dtype = str(getattr(feature, "dtype", ""))
    if dtype in ("string", "large_string"):
        return "strings"
    return "numbers" if dtype == "bool" or dtype.startswith(("int", "uint")) else str(feature)


def _classes(raw: RawSplit, column: str, dataset_id: str) -> tuple[list[str] | None, int]:
    """(class names, number of classes) from the train split; strings are their own names."""
    feature = (raw.features or {}).get(column)
    names: list[str] | None
    if isinstance(feature, ClassLabel):
        names, count = list(feature.names), int(feature.num_classes)
        if count < 2:
            raise DataError(f"dataset {dataset_id!r}: column {column!r} has one class only; at least two are needed.")
        if {name.lower() for name in names} <= KNOWN_SPLITS:
            raise DataError(
                f"dataset {dataset_id!r}: the classes would be {', '.join(names)}, which are its splits: the labels "
                "are not in the folders' names. Images with a metadata.csv need one in the folder of each split."
            )
        return names, count
    if isinstance(raw, IterableDataset):
        raise DataError(
            f"dataset {dataset_id!r}: column {column!r} does not say how many classes there are, which a stream "
            "must (feature ClassLabel). Leave out --streaming, or choose another --label-column."
        )
    found = [v for v in read_column(raw, column).unique().to_pylist() if v is not None]
    if found and all(isinstance(v, str) for v in found):
        numbers = all(value.isdecimal() for value in found)
        names, count = sorted(found, key=int if numbers else None), len(found)
    elif found and all(isinstance(v, bool) for v in found):
        names, count = ["False", "True"], 2
    else:
        present = sorted(int(v) for v in found if int(v) != -1)
        names, count = None, (present[-1] + 1 if present else 0)
        if present != list(range(count)):
            missing = sorted(set(range(count)) - set(present))
            raise DataError(
                f"dataset {dataset_id!r}: the numbers in column {column!r} are not 0, 1, 2, ... "
                + (f"({missing[0]} is missing, {present[-1]} is there)" if missing else f"({present[0]} is there)")
                + ". Choose another --label-column, or renumber the labels."
            )
    if count < 2:
        raise DataError(
            f"dataset {dataset_id!r}: column {column!r} has one class only; at least two are needed. "
            "Choose another --label-column."
        )
    return names, count


def check_labels(split: ImageSplit) -> None:
    """Every label of a map-style split is in range. Raises DataError naming the first that is not."""
    if not isinstance(split.dataset, Dataset):
        return
    labels = split.label_array()
    wrong = np.flatnonzero((labels < 0) | (labels >= split.num_classes))
    if len(wrong):
        value = split.dataset.select_columns([split.label_column])[int(wrong[0])][split.label_column]
        raise DataError(
            f"split {split.name!r}: {len(wrong)} labels are not one of the {split.num_classes} classes, the first "
            f"is {value!r} (image {wrong[0]}). Choose another split or --label-column, or remove those images."
        )
