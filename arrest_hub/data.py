"""Splits become batches of images: shuffling, augmentation, workers, processes.

Every random choice about image i in epoch e is a function of (seed, e, i) alone, so that a run repeats bit
for bit, resumes exactly, and sees the same images whatever the number of workers and processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset as HFDataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from arrest_hub.corrupt import CorruptImages, read_image
from arrest_hub.errors import DataError
from arrest_hub.images import ImageError
from arrest_hub.seeding import mix
from arrest_hub.splits import Splits, load_splits
from arrest_hub.stopping import outlive_termination
from arrest_hub.streams import StreamingImages
from arrest_hub.subsets import ImageSplit
from arrest_hub.transforms import Transform, transformed

__all__ = [
    "EpochSampler",
    "ImageDataset",
    "ImageSplit",
    "Splits",
    "StreamingImages",
    "eval_loader",
    "load_splits",
    "to_pixels",
    "train_loader",
]

Key = tuple[int, int]


def to_pixels(batch: Tensor) -> Tensor:
    """uint8 images of any shape -> float32 in [0, 1], on the same device; floats are pixels already and stay."""
    return batch.to(torch.float32).div_(255) if batch.dtype == torch.uint8 else batch


class EpochSampler(Sampler[Key]):
    """Yields (epoch, index) for index in 0..n - 1, in an order that depends on (seed, epoch) alone.

    The epoch travels with the index so that workers that outlive an epoch augment by the right one.
    """

    def __init__(self, n: int, *, seed: int = 0) -> None:
        self.n, self.seed, self.epoch = n, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation of the next iteration. Accelerate calls this through the loader."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[Key]:
        generator = torch.Generator().manual_seed(mix(self.seed, self.epoch))
        order = torch.randperm(self.n, generator=generator).tolist()
        return iter([(self.epoch, index) for index in order])


class ImageDataset(Dataset[dict[str, Any]]):
    """A map-style split as ``{"pixels": uint8 [3, H, W], "label": int, "index": int}``.

    The key is an index, or (epoch, index) as `EpochSampler` yields; a bare index means epoch 0. ``index`` is
    the position in the split. Raises ImageError naming split and index when an image cannot be decoded. What
    ``corrupt`` skips is replaced by the next image that can be read, whose index and label are given.
    """

    def __init__(
        self, split: ImageSplit, transform: Transform, seed: int = 0, corrupt: CorruptImages | None = None
    ) -> None:
        if not isinstance(split.dataset, HFDataset):
            raise TypeError(f"split {split.name!r} is a stream; use StreamingImages")
        self.name = split.name
        self.column = split.image_column
        self.transform, self.seed, self.corrupt = transform, seed, corrupt
        self._images = split.dataset.select_columns([split.image_column])
        self._rows = split.rows
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
        image, found = self._read(value, index), index
        while image is None:
            found = (found + 1) % len(self)
            if found == index:
                raise ImageError(f"split {self.name!r}: no image can be read. Repair the dataset.")
            image = self._read(self._images[found][self.column], found)
        pixels = transformed(self.transform, image, self.seed, epoch, index, self.name)
        return {"pixels": pixels, "label": int(self._labels[found]), "index": found}

    def _read(self, value: Any, index: int) -> Image.Image | None:
        """The image at a position; None if it is skipped."""
        row = None if self._rows is None else int(self._rows[index])
        return read_image(value, self.name, index, self.corrupt, fixed=True, row=row)


def train_loader(
    split: ImageSplit,
    transform: Transform,
    *,
    batch_size: int,
    seed: int,
    num_workers: int,
    num_processes: int = 1,
    process_index: int = 0,
    corrupt: CorruptImages | None = None,
) -> DataLoader:
    """Shuffled batches ``{"pixels": uint8 [B, 3, H, W], "label": int64 [B], "index": int64 [B]}``.

    The last incomplete batch is dropped. Call ``set_epoch`` on the sampler, the stream or (after
    ``accelerator.prepare``) the loader before each epoch. ``batch_size`` is per process. ``corrupt`` takes note of
    images that cannot be read, which are then skipped.

    Streams only: ``num_processes`` and ``process_index`` split the stream here (see `StreamingImages`).

    Raises DataError when there are too few images for one batch.
    """
    if not split.streaming:
        dataset = ImageDataset(split, transform, seed, corrupt)
        if len(dataset) < batch_size:
            raise DataError(
                f"split {split.name!r} has {len(dataset)} images, fewer than one batch of {batch_size}. "
                "Lower --batch-size, or raise --limit-train."
            )
        sampler = EpochSampler(len(dataset), seed=seed)
        return DataLoader(dataset, batch_size, sampler=sampler, drop_last=True, **_loader_options(num_workers, seed))
    size = split.num_examples
    if size is None and num_processes > 1:
        raise DataError(
            f"the length of the stream {split.name!r} is unknown, so {num_processes} processes cannot agree on "
            "the length of an epoch. Give --limit-train N."
        )
    if size is not None:
        batches = size // num_processes // batch_size
        num_workers = min(num_workers, batches)  # each has a batch to give
        if batches == 0:
            raise DataError(
                f"the stream {split.name!r} has {size} images, fewer than one batch of {batch_size} for each of "
                f"{num_processes} processes. Lower --batch-size, or raise --limit-train."
            )
    stream = StreamingImages(
        split,
        transform,
        seed,
        per_process=None if size is None else batches * batch_size,
        num_workers=num_workers,
        num_processes=num_processes,
        process_index=process_index,
        batch_size=batch_size,
        corrupt=corrupt,
    )
    return DataLoader(stream, batch_size, drop_last=True, **_loader_options(num_workers, seed))


def eval_loader(split: ImageSplit, transform: Transform, *, batch_size: int, num_workers: int) -> DataLoader:
    """Batches as from `train_loader`, every image once, in order; the last batch may be smaller."""
    if not split.streaming:
        return DataLoader(ImageDataset(split, transform), batch_size, **_loader_options(num_workers, 0))
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
