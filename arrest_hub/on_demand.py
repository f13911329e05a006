"""Splits that are downloaded and converted one by one, each when it is first asked for.

`datasets` always prepares every split of a dataset, which for an evaluation may be a hundred times too much. A
split opened apart is kept in a folder of its own, where `datasets` never takes it for a copy of the whole.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import pyarrow.parquet as pq
from datasets import Dataset, DatasetBuilder, Features, concatenate_datasets
from datasets.config import DATASET_INFO_FILENAME
from datasets.data_files import DataFilesDict
from datasets.splits import SplitDict

from arrest_hub.files import write_whole

NAMES_FILE = "splits.json"


class SplitsOnDemand(Mapping[str, Dataset]):
    """The names of the splits, known from the start, and the splits, each opened once by ``open_split(name)``."""

    def __init__(self, names: Iterable[str], open_split: Callable[[str], Dataset]) -> None:
        self._names, self._open_split = [str(name) for name in names], open_split
        self._opened: dict[str, Dataset] = {}

    def __getitem__(self, name: str) -> Dataset:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._opened:
            self._opened[name] = self._open_split(name)
        return self._opened[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names  # Mapping's own would open the split

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def prepared(builder: DatasetBuilder) -> dict[str, Dataset]:
    """Every split of a prepared builder; an empty one is no error here (in `datasets` it is)."""
    return {
        str(name): builder.as_dataset(split=name) if info.num_examples else Dataset.from_dict({}, features=Features())
        for name, info in (builder.info.splits or {}).items()
    }


def is_prepared(builder: DatasetBuilder) -> bool:
    """Whether the cache of `datasets` already holds every split."""
    return Path(builder.cache_dir, DATASET_INFO_FILENAME).is_file()


def opens_apart(builder: DatasetBuilder) -> bool:
    """Whether a split means the same without the others: Parquet files carry their classes.

    Image folders do not (their classes are the subfolders of all splits together), nor does a table of text.
    """
    return builder.name == "parquet" and bool(builder.config.data_files)


def open_apart(folder: Path, name: str, build: Callable[[], DatasetBuilder]) -> Dataset:
    """One split, from the copy in ``folder``, where it is first put if need be; ``build`` is called only then."""
    place = folder / f"split-{name}"
    if not (place / DATASET_INFO_FILENAME).is_file():  # `datasets` puts the folder in place once it is complete
        builder = build()
        if is_prepared(builder) or not opens_apart(builder):
            builder.download_and_prepare()
            return prepared(builder)[name]
        builder = _restricted(builder, name)
        builder.download_and_prepare(output_dir=str(place))
    return concatenate_datasets([Dataset.from_file(str(file)) for file in sorted(place.glob("*.arrow"))])


def _restricted(builder: DatasetBuilder, name: str) -> DatasetBuilder:
    """A copy of a builder that knows the files of one split only, and the features of all."""
    part, files = copy.deepcopy(builder), builder.config.data_files
    part.config.data_files = DataFilesDict({name: files[name]})
    first = next(iter(files.values()))[0]
    if part.info.features is None and os.path.isfile(first):  # all splits get those of the first file
        part.info.features = Features.from_arrow_schema(pq.read_schema(first))
    # what is expected, so that neither a missing split nor the disk space for it is an error
    known = part.info.splits or {}
    part.info.splits = SplitDict({name: known[name]}, dataset_name=part.dataset_name) if name in known else None
    part.info.size_in_bytes = part.info.dataset_size = part.info.download_size = None
    return part


def read_names(folder: Path) -> list[str] | None:
    """The names that `keep_names` wrote in ``folder``, None where it did not."""
    try:
        return json.loads((folder / NAMES_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None


def keep_names(folder: Path, builder: DatasetBuilder) -> list[str]:
    """Note the names of a builder's splits in ``folder``, for the time when the Hub cannot be reached."""
    names = [str(name) for name in builder.config.data_files]
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / NAMES_FILE, json.dumps(names))
    return names
