"""A split that is read as a stream, shared out over processes and their workers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset as HFIterableDataset
from torch.utils.data import IterableDataset, get_worker_info

from arrest_hub.corrupt import CorruptImages, read_image
from arrest_hub.images import ImageError
from arrest_hub.seeding import mix
from arrest_hub.subsets import SHUFFLE_BUFFER, ImageSplit
from arrest_hub.transforms import Transform, transformed


class StreamingImages(IterableDataset[dict[str, Any]]):
    """A streaming split as the same dicts as `ImageDataset`, each image read by exactly one reader.

    A reader is one worker of one process. The shards (files) of the stream are laid in a row, which is cut into as
    many equal pieces as there are readers; of a shard that is cut, each reader decodes its rows. A stream that cannot
    be read by shard is read whole by every reader. ``index`` counts the images of the epoch in the order of this
    arrangement: it is unique, but the image it names depends on the number of readers, and so does the order.

    ``per_process`` images, whole batches, make an epoch of each process, so that all take the same number of steps; its
    readers give the same number of batches, or the first of them one more. A reader that runs out early starts over.
    None: one pass, whatever its length. What ``corrupt`` skips is not counted.

    An epoch can be taken up in its middle, with `set_position`, without decoding what came before: a reader then takes
    the place of another, since the loader deals out batches of ``batch_size`` to its workers in turn and begins with
    the first.

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
        per_process: int | None = None,
        num_workers: int = 0,
        num_processes: int = 1,
        process_index: int = 0,
        batch_size: int = 1,
        corrupt: CorruptImages | None = None,
    ) -> None:
        if not isinstance(split.dataset, HFIterableDataset):
            raise TypeError(f"split {split.name!r} is not a stream; use ImageDataset")
        self.split, self.transform, self.seed = split, transform, seed
        self.shuffle, self.buffer_size, self.per_process = shuffle, buffer_size, per_process
        self.num_workers, self.num_processes, self.process_index = num_workers, num_processes, process_index
        self.batch_size, self.corrupt = batch_size, corrupt
        # epoch, batches done; in shared memory: persistent workers hold a copy of this object and must see the new ones
        self._position = torch.zeros(2, dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the augmentation of the next iteration."""
        self.set_position(epoch, 0)

    def set_position(self, epoch: int, batches: int) -> None:
        """Have the next iteration begin after ``batches`` batches of ``epoch`` in this process.

        Exact for one worker, or where ``per_process`` is given.
        """
        self._position.copy_(torch.tensor([epoch, batches]))

    def __len__(self) -> int:
        """Images an epoch yields in this process. Raises TypeError when that is unknown."""
        if self.per_process is not None:
            return self.per_process
        if self.split.num_examples is None or self.num_processes > 1:
            raise TypeError(f"the length of the stream {self.split.name!r} is unknown")
        return self.split.num_examples

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        workers, worker_id = (worker.num_workers, worker.id) if worker is not None else (1, 0)
        epoch, done = self._position.tolist()
        role = (worker_id + done) % workers  # whose turn the next batch is
        start = self.batch_size * (done // workers + (role < done % workers))
        readers = self.num_processes * workers
        reader = self.process_index * workers + role
        wanted = None if self.per_process is None else self._share(role, workers)
        count, lap = 0, 0
        while wanted is None or count < wanted:
            before = count
            for row in self._rows(reader, readers, epoch, lap):
                if wanted is not None and count >= wanted:
                    break
                index = count * readers + reader
                value = row[self.split.image_column]
                if count < start:  # what was seen before a resumption is counted, and not decoded
                    count += not (self.corrupt is not None and self.corrupt.knows(value))
                    continue
                image = read_image(value, self.split.name, index, self.corrupt)
                if image is None:
                    continue
                label = self.split.encode(row[self.split.label_column], index)
                pixels = transformed(self.transform, image, self.seed, epoch, index, self.split.name)
                yield {"pixels": pixels, "label": label, "index": index}
                count += 1
            if wanted is None:
                return
            if count == before:
                raise ImageError(
                    f"split {self.split.name!r}: no images reach reader {reader} of {readers}. "
                    "Use fewer workers or processes."
                )
            lap += 1

    def _share(self, role: int, workers: int) -> int:
        """Images of an epoch that a worker gives in its place among this process's workers."""
        assert self.per_process is not None
        batches = self.per_process // self.batch_size
        return self.batch_size * (batches // workers + (role < batches % workers))

    def _rows(self, reader: int, readers: int, epoch: int, lap: int) -> Iterator[dict[str, Any]]:
        """The undecoded rows of one reader, through a shuffle buffer."""
        stream, shards = self.split.dataset, self.split.dataset.num_shards
        rng = np.random.default_rng(mix(self.seed, epoch, lap))  # the same in every reader
        order = rng.permutation(shards) if self.shuffle else np.arange(shards)

        def rows() -> Iterator[dict[str, Any]]:
            if not (self.split.by_shard and self.shuffle):
                whole = _iterate(stream.skip(self.split.skip) if self.split.skip else stream)
                yield from (row for i, row in enumerate(whole) if i % readers == reader)
                return
            # in units of 1 / readers of a shard, a reader has as many as there are shards
            begin, end = reader * shards, (reader + 1) * shards
            for place in range(begin // readers, -(-end // readers)):
                shard = int(order[place])
                part = stream.shard(shards, shard)
                part = part.skip(self.split.skip) if shard == 0 and self.split.skip else part
                low, high = begin - place * readers, end - place * readers
                yield from (row for i, row in enumerate(_iterate(part)) if low <= i % readers < high)

        if not self.shuffle:
            yield from rows()
            return
        own = np.random.default_rng(mix(self.seed, epoch, lap, reader + 1))
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


def _iterate(stream: HFIterableDataset) -> Iterator[dict[str, Any]]:
    # `iter(batch_size)` rather than `iter(stream)`: the latter splits the stream over torch's workers by its
    # own rule, and this module has already done so
    for batch in stream.iter(batch_size=32):
        yield from (dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True))
