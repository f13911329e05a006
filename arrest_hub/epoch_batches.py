"""The batches that a process trains on in an epoch, and how many they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device

from arrest_hub.backbones import Backbone
from arrest_hub.checkpoint import Progress
from arrest_hub.config import FinetuneConfig
from arrest_hub.data import StreamingImages, train_loader
from arrest_hub.errors import ConfigError, DataError
from arrest_hub.run import Run
from arrest_hub.schedule import check_accumulation
from arrest_hub.transforms import train_transform


def training_batches(run: Run, student: Backbone, workers: int, phase: str = "robust") -> Any:
    """The loader of the training images, this process's share; the stronger augmentation is the robust phase's."""
    config, accelerator = run.config, run.accelerator
    stronger = (config.augment, config.random_erasing) if phase == "robust" else ()
    loader = train_loader(
        run.splits.train,
        train_transform(student.preprocessing, config.hflip, config.crop_min_scale, *stronger),
        batch_size=config.batch_size, seed=config.seed, num_workers=workers,
        num_processes=accelerator.num_processes, process_index=accelerator.process_index, corrupt=run.corrupt,
    )  # fmt: skip
    # a stream is already split over the processes
    return loader if config.streaming else accelerator.prepare(loader)


def count_batches(run: Run, loader: Any) -> int | None:
    """Batches of an epoch in each process, enough for whole steps; None for a stream of unknown length.

    Raises:
        ConfigError: they are not enough for one step.
    """
    if run.splits.train.num_examples is None:
        return None
    accumulated = run.config.grad_accum_steps
    check_accumulation(accumulated, len(loader))
    return len(loader) // accumulated * accumulated


def check_epoch(config: FinetuneConfig, progress: Progress, steps_per_epoch: int | None) -> None:
    """At the end of an epoch. Raises ConfigError if a stream of unknown length was too short for a single step: no
    other epoch would be longer."""
    if steps_per_epoch is None and progress.batch < config.grad_accum_steps:
        raise ConfigError(
            f"the stream ended after {progress.batch} whole batches of {config.batch_size} images, and a step takes "
            f"{config.grad_accum_steps}: give a smaller --batch-size, --grad-accum-steps or --num-workers (each worker "
            "leaves out its last incomplete batch)."
        )


def epoch_batches(
    accelerator: Accelerator, loader: Any, progress: Progress, batches_per_epoch: int | None
) -> Iterator[dict[str, torch.Tensor]]:
    """The batches of the current epoch that are still to come."""
    stream = loader.dataset if isinstance(loader.dataset, StreamingImages) else None
    # before the skip: the loader that skip_first_batches returns does not pass the epoch on to a sharded sampler
    (loader if stream is None else stream).set_epoch(progress.epoch)
    if stream is not None and (batches_per_epoch is not None or loader.num_workers <= 1):
        stream.set_position(progress.epoch, progress.batch)
        batches = loader
    else:
        batches = accelerator.skip_first_batches(loader, progress.batch) if progress.batch else loader
    for number, batch in enumerate(batches, progress.batch):
        if number == batches_per_epoch:  # the rest is not enough for a step
            break
        yield send_to_device(batch, accelerator.device, non_blocking=accelerator.non_blocking)


@contextmanager
def dead_workers_reported() -> Iterator[None]:
    """One clear error for a data loading process that was killed.

    torch raises it from a signal handler, so anywhere in the loop and not only where a batch is awaited.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            "a data loading process died, killed or out of memory. Give a smaller --num-workers (0: none) and "
            "continue with --resume."
        ) from error
