"""Splits become batches of images: shuffling, augmentation, workers, processes.

Every random choice about image i in epoch e is a function of (seed, e, i) alone, so that a run repeats bit
for bit, resumes exactly, and sees the same images whatever the number of workers and processes.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from datasets import Dataset as HFDataset
from datasets import IterableDataset as HFIterableDataset
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from arrest_hub.errors import DataError
from arrest_hub.images import ImageError, decode_image
from arrest_hub.splits import EvalData, Splits, load_eval_split, load_splits
from arrest_hub.stopping import outlive_termination
from arrest_hub.subsets import SHUFFLE_BUFFER, ImageSplit
from arrest_hub.transforms import Transform

__all__ = [
    "EpochSampler",
    "EvalData",
    "ImageDataset",
    "ImageError",
    "ImageSplit",
    "Splits",
    "StreamingImages",
    "decode_image",
    "eval_loader",
    "load_eval_split",
    "load_splits",
    "to_pixels",
    "train_loader",
]

Key = tuple[int, int]


def to_pixels(batch: Tensor) -> Tensor:
    """uint8 images of any shape -> float32 in [0, 1], on the same device."""
    return batch.to(torch.float32).div_(255)


class EpochSampler(Sampler[Key]):
    """Yields (epoch, index) for index in 0..n - 1, in an order that depends on (seed, epoch) alone.

    The epoch travels with the index so that workers that outlive an epoch augment by the right one.
    """

    def __init__(self, n: int, *, seed: int = 0, shuffle: bool = True) -> None:
        self.n, self.seed, self.shuffle = n, seed, shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation of the next iteration. Accelerate calls this through the loader."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[Key]:
        epoch = self.epoch
        if self.shuffle:
            generator = torch.Generator().manual_seed(_hash(self.seed, epoch))
            order = torch.randperm(self.n, generator=generator).tolist()
        else:
            order = list(range(self.n))
        return iter([(epoch, index) for index in order])


class ImageDataset(Dataset[dict[str, Any]]):
    """A map-style split as ``{"pixels": uint8 [3, H, W], "label": int, "index": int}``.

    The key is an index, or (epoch, index) as `EpochSampler` yields; a bare index means epoch 0. ``index`` is
    the position in the split. Raises ImageError naming split and index when an image cannot be decoded.
    """

    def __init__(self, split: ImageSplit, transform: Transform, seed: int = 0) -> None:
        if not isinstance(split.dataset, HFDataset):
            raise TypeError(f"split {split.name!r} is a stream; use StreamingImages")
        self.name = split.name
        self.column = split.image_column
        self.transform, self.seed = transform, seed
        self._images = split.dataset.select_columns([split.image_column])
        self._labels = split.label_array()

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, key: int | Key) -> dict[str, Any]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[int | Key]) -> list[dict[str, Any]]:
        """A batch at once, as torch's loader asks for it: `datasets` is much slower row by row."""
        pairs = [key if isinstance(key, tuple) else (0, key) for key in keys]
        encoded = self._images[[index for _, index in pairs]][self.column]
        return [self._item(value, *pair) for value, pair in zip(encoded, pairs, strict=True)]

    def _item(self, value: Any, epoch: int, index: int) -> dict[str, Any]:
        image = _decode(value, self.name, index)
        with _seeded(self.seed, epoch, index):
            pixels = self.transform(image)
        return {"pixels": pixels, "label": int(self._labels[index]), "index": index}


class StreamingImages(IterableDataset[dict[str, Any]]):
    """A streaming split as the same dicts as `ImageDataset`, each image read by exactly one reader.

    A reader is one worker of one process. Readers share the shards (files) of the stream where it has enough
    of them; otherwise every reader reads all of it and decodes its part. ``index`` counts the images of the
    epoch in the order of this arrangement: it is unique, but the image it names depends on the number of
    readers, and so does the order.

    ``per_reader`` images make an epoch for each reader, so that all processes take the same number of steps;
    a reader that runs out early starts over. None: one pass, whatever its length.

    Leave ``num_processes`` at 1 for a loader given to ``accelerator.prepare``, which then splits the batches
    (reading everything in the first process); otherwise give this process's place and skip ``prepare``.
    """

    def __init__(
        self,
        split: ImageSplit,
        transform: Transform,
        seed: int = 0,
        *,
        shuffle: bool = True,
        buffer_size: int = SHUFFLE_BUFFER,
        per_reader: int | None = None,
        num_workers: int = 0,
        num_processes: int = 1,
        process_index: int = 0,
    ) -> None:
        if not isinstance(split.dataset, HFIterableDataset):
            raise TypeError(f"split {split.name!r} is not a stream; use ImageDataset")
        self.split, self.transform, self.seed = split, transform, seed
        self.shuffle, self.buffer_size, self.per_reader = shuffle, buffer_size, per_reader
        self.num_workers, self.num_processes, self.process_index = num_workers, num_processes, process_index
        # in shared memory: persistent workers hold a copy of this object and must see the new epoch
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the augmentation of the next iteration."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        """Images an epoch yields in this process. Raises TypeError when that is unknown."""
        if self.per_reader is not None:
            return self.per_reader * max(1, self.num_workers)
        if self.split.num_examples is None or self.num_processes > 1:
            raise TypeError(f"the length of the stream {self.split.name!r} is unknown")
        return self.split.num_examples

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        workers, worker_id = (worker.num_workers, worker.id) if worker is not None else (1, 0)
        readers = self.num_processes * workers
        reader = self.process_index * workers + worker_id
        epoch = int(self._epoch)
        count, lap = 0, 0
        while self.per_reader is None or count < self.per_reader:
            before = count
            for row in self._rows(reader, readers, epoch, lap):
                if self.per_reader is not None and count >= self.per_reader:
                    break
                index = count * readers + reader
                image = _decode(row[self.split.image_column], self.split.name, index)
                label = self.split.encode(row[self.split.label_column], index)
                with _seeded(self.seed, epoch, index):
                    pixels = self.transform(image)
                yield {"pixels": pixels, "label": label, "index": index}
                count += 1
            if self.per_reader is None:
                return
            if count == before:
                raise ImageError(
                    f"split {self.split.name!r}: no images reach reader {reader} of {readers}. "
                    "Use fewer workers or processes."
                )
            lap += 1

    def _rows(self, reader: int, readers: int, epoch: int, lap: int) -> Iterator[dict[str, Any]]:
        """The undecoded rows of one reader, through a shuffle buffer."""
        stream, shards = self.split.dataset, self.split.dataset.num_shards
        rng = np.random.default_rng(_hash(self.seed, epoch, lap))  # the same in every reader
        order = rng.permutation(shards) if self.shuffle else np.arange(shards)
        apart = self.split.by_shard and self.shuffle and shards >= readers

        def rows() -> Iterator[dict[str, Any]]:
            if apart:
                for shard in order[reader::readers]:
                    part = stream.shard(shards, int(shard))
                    yield from _iterate(part.skip(self.split.skip) if shard == 0 and self.split.skip else part)
            elif self.split.by_shard and self.shuffle:
                yield from every(
                    row
                    for shard in order
                    for row in _iterate(stream.shard(shards, int(shard)).skip(self.split.skip if shard == 0 else 0))
                )
            else:
                yield from every(_iterate(stream.skip(self.split.skip) if self.split.skip else stream))

        def every(all_rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
            return (row for i, row in enumerate(all_rows) if i % readers == reader)

        if not self.shuffle:
            yield from rows()
            return
        own = np.random.default_rng(_hash(self.seed, epoch, lap, reader + 1))
        buffer: list[dict[str, Any]] = []
        for row in rows():
            if len(buffer) < self.buffer_size:
                buffer.append(row)
                continue
            i = int(own.integers(len(buffer)))
            yield buffer[i]
            buffer[i] = row
        for i in own.permutation(len(buffer)):
            yield buffer[i]


def train_loader(
    split: ImageSplit,
    transform: Transform,
    *,
    batch_size: int,
    seed: int,
    num_workers: int,
    num_processes: int = 1,
    process_index: int = 0,
    epoch_size: int | None = None,
) -> DataLoader:
    """Shuffled batches ``{"pixels": uint8 [B, 3, H, W], "label": int64 [B], "index": int64 [B]}``.

    The last incomplete batch is dropped. Call ``set_epoch`` on the sampler, the stream or (after
    ``accelerator.prepare``) the loader before each epoch. ``batch_size`` is per process.

    Streams only: ``num_processes`` and ``process_index`` split the stream here (see `StreamingImages`), and
    ``epoch_size`` is the number of images of an epoch over all processes (default: the stream's length, or
    one pass when that is unknown). Raises DataError when there are too few images for one batch.
    """
    if not split.streaming:
        dataset = ImageDataset(split, transform, seed)
        if len(dataset) < batch_size:
            raise DataError(
                f"split {split.name!r} has {len(dataset)} images, fewer than one batch of {batch_size}. "
                "Lower --batch-size, or raise --limit-train."
            )
        sampler = EpochSampler(len(dataset), seed=seed)
        return DataLoader(dataset, batch_size, sampler=sampler, drop_last=True, **_loader_options(num_workers, seed))
    size = split.num_examples if epoch_size is None else epoch_size
    if size is None and num_processes > 1:
        raise DataError(
            f"the length of the stream {split.name!r} is unknown, so {num_processes} processes cannot agree on "
            "the length of an epoch. Give --limit-train N."
        )
    if size is not None:
        # whole batches for every worker, or a part of each worker's last batch would be lost
        num_workers = min(num_workers, size // num_processes // batch_size)
        per_reader = size // num_processes // max(1, num_workers) // batch_size * batch_size
        if per_reader == 0:
            raise DataError(
                f"the stream {split.name!r} has {size} images, fewer than one batch of {batch_size} for each of "
                f"{num_processes} processes. Lower --batch-size, or raise --limit-train."
            )
    stream = StreamingImages(
        split,
        transform,
        seed,
        per_reader=None if size is None else per_reader,
        num_workers=num_workers,
        num_processes=num_processes,
        process_index=process_index,
    )
    return DataLoader(stream, batch_size, drop_last=True, **_loader_options(num_workers, seed))


def eval_loader(split: ImageSplit, transform: Transform, *, batch_size: int, num_workers: int) -> DataLoader:
    """Batches as from `train_loader`, every image once, in order; the last batch may be smaller."""
    if not split.streaming:
        dataset = ImageDataset(split, transform)
        sampler = EpochSampler(len(dataset), shuffle=False)
        return DataLoader(dataset, batch_size, sampler=sampler, **_loader_options(num_workers, 0))
    # one worker at most: several would interleave their parts of the stream
    stream = StreamingImages(split, transform, shuffle=False)
    return DataLoader(stream, batch_size, **_loader_options(min(1, num_workers), 0))


def _loader_options(num_workers: int, seed: int) -> dict[str, Any]:
    return {
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
        "pin_memory": torch.cuda.is_available(),
        # its own generator: otherwise each epoch would draw from the global one that the training loop uses
        "generator": torch.Generator().manual_seed(seed),
        "worker_init_fn": outlive_termination,
    }


def _iterate(stream: HFIterableDataset) -> Iterator[dict[str, Any]]:
    # `iter(batch_size)` rather than `iter(stream)`: the latter splits the stream over torch's workers by its
    # own rule, and this module has already done so
    for batch in stream.iter(batch_size=32):
        yield from (dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True))


def _decode(value: Any, name: str, index: int) -> Any:
    if value is None:
        raise ImageError(f"split {name!r}, image {index}: it is missing. Remove it from the dataset.")
    try:
        return decode_image(value)
    except ImageError as error:
        path = value.get("path") if isinstance(value, dict) else None
        where = f" ({path})" if path else ""
        raise ImageError(f"split {name!r}, image {index}{where}: {error}. Repair or remove it.") from error


def _hash(*numbers: int) -> int:
    """Numbers -> 63 well-mixed bits, the same on every machine."""
    data = struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


@contextmanager
def _seeded(seed: int, epoch: int, index: int) -> Iterator[None]:
    """Seed torch's default CPU generator, and only that, by the image; put it back afterwards.

    torchvision's transforms draw from it. The global seeding of torch would reset the CUDA generators too.
    """
    generator = torch.default_generator
    state = generator.get_state()
    # the Mersenne twister takes 32 bits
    generator.manual_seed(_hash(seed, epoch, index) & 0xFFFFFFFF)
    try:
        yield
    finally:
        generator.set_state(state)
