"""One split of a dataset, and the smaller splits made out of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset

from arrest_hub.errors import DataError
from arrest_hub.images import ImageError, encoded_bytes

SAMPLE = 32
LOOK_AHEAD = 256
"""Labels at the start of a stream that tell whether it is sorted by class."""
SHUFFLE_BUFFER = 1000
"""Examples held in memory to shuffle a stream."""


@dataclass
class ImageSplit:
    """The raw, undecoded images of one split and what their labels mean.

    ``dataset`` is map-style, or streaming when ``streaming`` is true; its image column has the feature
    ``Image(decode=False)``. ``codes`` is set where the label column holds strings, or numbers the classes otherwise
    than the dataset does: what is in the column -> the label.
    ``label_map`` remaps: label i of the dataset becomes ``label_map[i]`` (set it to the ``order`` of
    `labels.match_labels` before making a loader).
    ``num_examples`` is None for a stream of unknown length. ``skip`` and ``by_shard`` concern streams: the
    split is ``dataset`` without its first ``skip`` examples, all of them in its first shard, and its shards
    may be read separately when ``by_shard``.
    ``drawn_from`` tells the split that these images were held out of, see `split_digest`.
    ``rows`` (int64 [N], None: 0..N - 1) says where each image was in the split as it is kept, before some were
    chosen or held out; see `row_array`.
    """

    dataset: Dataset | IterableDataset
    image_column: str
    label_column: str
    name: str
    num_classes: int
    num_examples: int | None = None
    codes: Mapping[Any, int] | None = None
    label_map: list[int] | None = None
    skip: int = 0
    by_shard: bool = False
    rows: np.ndarray | None = None
    drawn_from: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.dataset, Dataset):
            self.num_examples = len(self.dataset)

    @property
    def streaming(self) -> bool:
        return not isinstance(self.dataset, Dataset)

    def __len__(self) -> int:
        """The number of images. Raises TypeError for a stream (use ``num_examples``)."""
        if isinstance(self.dataset, Dataset):
            return len(self.dataset)
        raise TypeError(f"split {self.name!r} is a stream and has no length; use num_examples")

    def __bool__(self) -> bool:
        return True  # a stream is no less true for having no length

    def labels(self) -> list[int]:
        """Every label, after ``label_map``, without touching an image. Raises TypeError for a stream."""
        return self.label_array().tolist()

    def label_array(self) -> np.ndarray:
        """`labels` as int64 [N]."""
        if not isinstance(self.dataset, Dataset):
            raise TypeError(f"split {self.name!r} is a stream; its labels are known as they come")
        labels = _labels(read_column(self.dataset, self.label_column), self.codes)
        return labels if self.label_map is None else np.asarray(self.label_map)[labels]

    def row_array(self) -> np.ndarray:
        """The row of every image in the split as it is kept, int64 [N]. Raises TypeError for a stream."""
        return np.arange(len(self), dtype=np.int64) if self.rows is None else self.rows

    def select(self, rows: np.ndarray, name: str) -> ImageSplit:
        """The images at ``rows`` (int [M], positions in this split), in that order. Raises TypeError for a stream."""
        if not isinstance(self.dataset, Dataset):
            raise TypeError(f"split {self.name!r} is a stream; no images can be chosen by their position")
        return replace(self, dataset=self.dataset.select(rows), name=name, rows=self.row_array()[rows])

    def encode(self, value: Any, position: int) -> int:
        """The label of one raw value from the label column of a stream, checked and remapped.

        Raises ImageError when it is missing or outside 0..num_classes - 1.
        """
        label = value if self.codes is None else self.codes.get(value)
        if not isinstance(label, int) or not 0 <= label < self.num_classes:
            raise ImageError(
                f"split {self.name!r}, image {position}: label {value!r} is not one of the {self.num_classes} "
                f"classes (0 to {self.num_classes - 1}). Correct the data, or choose another --label-column."
            )
        return label if self.label_map is None else self.label_map[label]


def split_digest(split: ImageSplit, begin: bytes = b"") -> str | None:
    """What tells a map-style split: a digest of ``begin``, labels, rows, and of the files of `SAMPLE` images, so that
    not all are read; None if one of these cannot be read, since it may be repaired."""
    digest = hashlib.sha256(begin)
    digest.update(np.asarray(split.label_array()).tobytes() + split.row_array().tobytes())
    some = np.linspace(0, len(split) - 1, min(SAMPLE, len(split)), dtype=int).tolist()
    assert isinstance(split.dataset, Dataset)
    for value in split.dataset.select_columns([split.image_column])[some][split.image_column]:
        content = encoded_bytes(value)
        if content is None:
            return None
        digest.update(content)
    return f"sha256:{digest.hexdigest()[:16]}"


def hold_out(
    train: ImageSplit, test_size: int, validation_size: int, seed: int, notes: list[str]
) -> tuple[ImageSplit, ImageSplit | None, ImageSplit | None]:
    """Take a test and a validation split (0: none) out of ``train``: (what is left, test, validation)."""
    sizes = {"test": test_size, "validation": validation_size}
    taken: dict[str, ImageSplit | None] = {"test": None, "validation": None}
    origin = train.name
    _check_stream(train, sum(sizes.values()))
    if isinstance(train.dataset, Dataset):
        drawn_from = split_digest(train)
    for role, size in sizes.items():
        if size and isinstance(train.dataset, Dataset):
            labels = train.label_array()
            # no class may lose more than half of its images
            rows = balanced_subset(labels, size, seed + (1 if role == "test" else 2), _TOO_FEW[role], keep_half=True)
            taken[role] = replace(train.select(rows, f"{origin}[held-out {role}]"), drawn_from=drawn_from)
            rest = np.setdiff1d(np.arange(len(labels)), rows, assume_unique=True)
            train = train.select(rest, f"{origin}[without held out]")
            notes.append(f"{role}: {size} images held out of {origin!r}, classes as equal as possible, seed {seed}")
    total = sum(sizes.values())
    if total and isinstance(train.dataset, IterableDataset):
        stream, known = train.dataset, train.num_examples
        # one shard, if clearly large enough, so that readers can still take the other shards apart
        by_shard = stream.num_shards > 1 and known is not None and known >= 2 * total * stream.num_shards
        by_shard = by_shard and _holds(stream.shard(stream.num_shards, 0), total, train.label_column)
        source = stream.shard(stream.num_shards, 0) if by_shard else stream
        start = 0
        for role, size in sizes.items():
            if size:
                part = source.skip(start).take(size)
                taken[role] = replace(
                    train, dataset=part, name=f"{origin}[held-out {role}]", num_examples=size, by_shard=False
                )
                start += size
                notes.append(
                    f"{role}: {size} images held out of the start of the stream {origin!r} by skip and take, "
                    "in its order, not balanced over the classes"
                )
        train = replace(
            train,
            dataset=stream if by_shard else stream.skip(total),
            skip=total if by_shard else 0,
            by_shard=by_shard,
            num_examples=None if known is None else known - total,
            name=f"{origin}[without held out]",
        )
        if not by_shard:
            notes.append(
                "every loader worker reads the whole training stream and keeps its part, since images are held "
                "out across its shards (--validation-size 0 or an own validation split avoids it)"
            )
    return train, taken["test"], taken["validation"]


def _holds(stream: IterableDataset, count: int, column: str) -> bool:
    """Whether a stream has ``count`` examples, which it reads up to there."""
    return any(True for _ in stream.select_columns([column]).skip(count - 1).take(1))


def limit(split: ImageSplit, size: int | None, seed: int, notes: list[str], flag: str) -> ImageSplit:
    """``split`` with at most ``size`` images (None: all), balanced over the classes unless it is a stream."""
    known = split.num_examples
    if size is None or (known is not None and size >= known):
        return split
    name = f"{split.name}[{size}]"
    if isinstance(split.dataset, Dataset):
        rows = balanced_subset(split.label_array(), size, seed + 3)
        notes.append(f"{flag} {size}: of the {known} images of {split.name!r}, balanced, seed {seed}")
        return split.select(rows, name)
    stream = split.dataset.skip(split.skip) if split.skip else split.dataset
    # one shard at a time: reading several at once, `datasets` sleeps for 5 s when a reader stops early
    stream = stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER, max_buffer_input_shards=1).take(size)
    notes.append(
        f"{flag} {size}: the first {size} images of the stream {split.name!r} shuffled with seed {seed}, "
        "not balanced over the classes"
    )
    return replace(split, dataset=stream, name=name, num_examples=size, skip=0, by_shard=False)


_TOO_FEW = {
    "test": "They were to be the test split, which this dataset lacks: name a split with --eval-split",
    "validation": "Give a smaller number (--validation-size 0: none)",
}


def _check_stream(train: ImageSplit, total: int) -> None:
    """Raises DataError where ``total`` images are to be held out of the start of a stream that is sorted by class."""
    if not total or isinstance(train.dataset, Dataset):
        return
    head = [row[train.label_column] for row in train.dataset.select_columns([train.label_column]).take(LOOK_AHEAD)]
    if len(head) == LOOK_AHEAD and len(set(head)) == 1:
        raise DataError(
            f"the stream {train.name!r} seems to be sorted by class: its first {LOOK_AHEAD} labels are all "
            f"{head[0]!r}. The {total} images to be held out of its start would be of few classes, which training "
            "would then lack. "
            "Leave out --streaming, or give --eval-split and --validation-size 0."
        )


def balanced_subset(
    labels: np.ndarray, size: int, seed: int, otherwise: str = "Give a smaller number", keep_half: bool = False
) -> np.ndarray:
    """``size`` indices into ``labels`` (int [N]), ascending, with class counts as equal as possible.

    A class with too few images gives all it has (half of them with ``keep_half``) and the others make up
    for it. Raises DataError when there are not enough images in all, which ends with ``otherwise``.
    """
    if not size:
        return np.empty(0, dtype=np.int64)
    rng = np.random.default_rng(seed)
    labels = np.asarray(labels)
    _, counts = np.unique(labels, return_counts=True)
    room = counts // 2 if keep_half else counts.copy()
    if size > room.sum():
        raise DataError(
            f"{size} images cannot be taken out of {len(labels)}"
            + (f" of {len(counts)} classes leaving at least half of every class" if keep_half else "")
            + f"; at most {room.sum()} can. {otherwise}."
        )
    quota = np.zeros_like(counts)
    while (left := size - quota.sum()) > 0:
        open_classes = np.flatnonzero(quota < room)
        if left < len(open_classes):  # who gets the last ones is drawn
            quota[rng.permutation(open_classes)[:left]] += 1
        else:
            step = min(left // len(open_classes), int((room - quota)[open_classes].min()))
            quota[open_classes] += step
    by_class = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
    chosen = [rng.permutation(rows)[:n] for rows, n in zip(by_class, quota, strict=True)]
    return np.sort(np.concatenate(chosen))


def read_column(dataset: Dataset, name: str) -> Any:
    """One column as a pyarrow ChunkedArray, without reading the others."""
    return dataset.select_columns([name]).with_format("arrow")[:].column(name)


def _labels(column: Any, codes: Mapping[Any, int] | None) -> np.ndarray:
    """A label column -> int64 [N]; missing labels are -1, as is what ``codes`` does not know."""
    if codes is None:
        return pc.fill_null(column.cast("int64"), -1).to_numpy().astype(np.int64)
    return np.array([codes.get(value, -1) for value in column.to_pylist()], dtype=np.int64)
