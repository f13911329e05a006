"""The one training loop: batches -> objective -> optimizer, with logging, validation, checkpoints and resumption."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from tqdm import tqdm

from arrest_hub.arrest import Objective
from arrest_hub.backbones import Backbone
from arrest_hub.checkpoint import Progress, derive_seed, list_checkpoints, load_checkpoint, save_checkpoint
from arrest_hub.config import FinetuneConfig
from arrest_hub.data import ImageSplit, Splits, StreamingImages, eval_loader, to_pixels, train_loader
from arrest_hub.errors import ArrestError, DataError
from arrest_hub.export import write_model_folder
from arrest_hub.prepare import RunPaths
from arrest_hub.progress import Log, Meter, progress_bar
from arrest_hub.results import harmonic_mean
from arrest_hub.transforms import eval_transform, train_transform
from arrest_hub.validation import Counts, PgdSettings, count_correct

# far above the cross-entropy that a confident network can have at its first adversarial batch
DIVERGED = 1e5


@dataclass
class Run:
    """What both phases share."""

    config: FinetuneConfig
    paths: RunPaths
    accelerator: Accelerator
    splits: Splits
    log: Log
    num_workers: int
    model_revision: str | None
    images_logged: int = 0
    validation_loader: Any = None


def train_phase(
    run: Run,
    phase: str,
    student: Backbone,
    objective: Objective,
    *,
    epochs: int,
    lr: float,
    max_steps: int | None,
    ema: ModelEmaV3 | None,
) -> Progress:
    """Train ``student`` in place for ``epochs`` or ``max_steps``, resuming from a checkpoint of this phase if asked to.

    Every random draw is seeded by where the run stands, so a resumed run continues bit for bit (on a CPU).
    Raises ArrestError if training diverges, DataError if an image cannot be read.
    """
    config, accelerator = run.config, run.accelerator
    transform = train_transform(student.preprocessing, config.hflip, config.crop_min_scale)
    loader = train_loader(
        run.splits.train, transform, batch_size=config.batch_size, seed=config.seed, num_workers=run.num_workers,
        num_processes=accelerator.num_processes, process_index=accelerator.process_index,
    )  # fmt: skip
    if not config.streaming:  # a stream is already split over the processes
        loader = accelerator.prepare(loader)
    batches_per_epoch = _batches_per_epoch(run, loader)
    steps_per_epoch = math.ceil(batches_per_epoch / config.grad_accum_steps) if batches_per_epoch else None
    if steps_per_epoch is not None:
        total_steps = min(max_steps or epochs * steps_per_epoch, epochs * steps_per_epoch)
    else:
        assert max_steps is not None  # checked in prepare_data
        total_steps = max_steps

    optimizer = create_optimizer_v2(
        student, opt=config.optimizer, lr=lr, weight_decay=config.weight_decay, momentum=config.momentum
    )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=config.scheduler,
        num_epochs=total_steps,  # counted in steps, so that --max-steps and a fractional warm-up just work
        updates_per_epoch=1,
        step_on_epochs=False,
        warmup_epochs=min(round(config.warmup_epochs * (steps_per_epoch or 0)), total_steps - 1),
        warmup_lr=0.0,
        warmup_prefix=False,
        min_lr=config.min_lr,
        decay_epochs=max(1, total_steps // 3),
        decay_milestones=[round(total_steps * share) for share in (0.5, 0.75)],
    )
    model, optimizer = accelerator.prepare(student, optimizer)
    progress = Progress(
        phase, model_revision=run.model_revision, dataset_revision=run.splits.revision,
        num_processes=accelerator.num_processes,
    )  # fmt: skip
    checkpoints = list_checkpoints(run.paths.checkpoints, phase) if config.resume else []
    if checkpoints:
        progress = load_checkpoint(accelerator, checkpoints[-1], ema)
        accelerator.print(f"resuming from {checkpoints[-1]} ({phase} phase, step {progress.step} of {total_steps})")
    if config.resume:
        run.log.rewind(phase, progress.step)
    began = time.perf_counter() - progress.seconds
    scheduler.step_update(progress.step)

    generator = torch.Generator(device=accelerator.device)
    meter = Meter()
    images = config.batch_size * accelerator.num_processes
    logged_at, logged_images = time.perf_counter(), 0
    model.train()
    done, total = (steps * config.grad_accum_steps * images for steps in (progress.step, total_steps))
    # the bar is closed before an error is printed
    with _dead_workers_reported(), progress_bar(total, done, phase, accelerator) as bar:
        while progress.step < total_steps:
            for batch in _epoch_batches(accelerator, loader, progress):
                seed_parts = (config.seed, phase, progress.epoch, progress.batch, accelerator.process_index)
                generator.manual_seed(derive_seed("attack", *seed_parts))
                torch.manual_seed(derive_seed("dropout", *seed_parts))
                with accelerator.accumulate(model):
                    with accelerator.autocast():
                        parts = objective(model, student, to_pixels(batch["pixels"]), batch["label"], generator)
                    accelerator.backward(parts["loss"])
                    if accelerator.sync_gradients and config.clip_grad is not None:
                        parts["grad_norm"] = accelerator.clip_grad_norm_(model.parameters(), config.clip_grad)
                    optimizer.step()
                    optimizer.zero_grad()
                meter.add(parts)
                progress.batch += 1
                logged_images += images
                bar.update(images)
                if not accelerator.sync_gradients:
                    continue
                progress.step += 1
                scheduler.step_update(progress.step)
                if ema is not None:
                    ema.update(student, step=progress.step)
                if progress.step % config.log_every == 0 or progress.step == total_steps:
                    values = meter.reduce(accelerator)
                    seconds = time.perf_counter() - logged_at
                    values |= {"lr": optimizer.param_groups[0]["lr"], "images_per_second": logged_images / seconds}
                    run.images_logged += logged_images
                    _log(run, phase, progress, values, bar)
                    logged_at, logged_images = time.perf_counter(), 0
                if progress.step == total_steps:
                    break
                # at the end of an epoch it is written below, when the epoch's validation is part of it
                progress.seconds = time.perf_counter() - began
                due = config.checkpoint_every and progress.step % config.checkpoint_every == 0
                if due and progress.batch != batches_per_epoch:
                    save_checkpoint(accelerator, run.paths.checkpoints, progress, ema, config.keep_checkpoints)
            progress.epoch += 1
            progress.batch = 0
            finished = progress.step >= total_steps
            if config.eval_every and (progress.epoch % config.eval_every == 0 or finished):
                _validate(run, phase, student, ema, progress)
                model.train()
                logged_at = time.perf_counter()
            progress.seconds = time.perf_counter() - began
            if finished or not config.checkpoint_every or progress.step % config.checkpoint_every == 0:
                save_checkpoint(accelerator, run.paths.checkpoints, progress, ema, config.keep_checkpoints)
    return progress


def _epoch_batches(accelerator: Accelerator, loader: Any, progress: Progress) -> Iterator[dict[str, torch.Tensor]]:
    """The batches of the current epoch that are still to come."""
    # before the skip: the loader that skip_first_batches returns does not pass the epoch on to a sharded sampler
    (loader.dataset if isinstance(loader.dataset, StreamingImages) else loader).set_epoch(progress.epoch)
    batches = accelerator.skip_first_batches(loader, progress.batch) if progress.batch else loader
    for batch in batches:
        yield send_to_device(batch, accelerator.device)


@contextmanager
def _dead_workers_reported() -> Iterator[None]:
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


def _batches_per_epoch(run: Run, loader: Any) -> int | None:
    """Batches of an epoch in each process, or None for a stream of unknown length."""
    return None if run.splits.train.num_examples is None else len(loader)


def _log(run: Run, phase: str, progress: Progress, values: dict[str, float], bar: Any) -> None:
    """A line of log.jsonl, the tracker and the bar; stops a run that has diverged."""
    if not values["loss"] < DIVERGED:  # also if it is not a number
        raise ArrestError(
            f"the loss is {values['loss']:.3g} at step {progress.step} of the {phase} phase: training diverged. Start "
            "again with a smaller --lr, or with --warmup-epochs or --clip-grad 1."
        )
    run.log.write({"phase": phase, "step": progress.step, "epoch": progress.epoch, **values}, run.images_logged)
    shown = {
        name: values[name]
        for name in ("loss", "clean_accuracy", "adversarial_accuracy", "replay_rate")
        if name in values
    }
    bar.set_postfix({name.split("_")[0]: f"{value:.3g}" for name, value in shown.items()})


def _validate(run: Run, phase: str, student: Backbone, ema: ModelEmaV3 | None, progress: Progress) -> None:
    """Clean accuracy, and in the robust phase PGD accuracy, on the validation images; keeps the best weights.

    The test split plays no part in the choice.
    """
    if run.splits.validation is None:
        return
    model = ema.module if ema is not None else student
    counts = count_validation(run, run.splits.validation, model, attack=phase == "robust")
    values: dict[str, Any] = {"validation_clean_accuracy": counts.clean / counts.n, "n": counts.n}
    if phase == "robust":
        score = harmonic_mean(counts.clean / counts.n, counts.robust / counts.n)
        values |= {"validation_robust_accuracy": counts.robust / counts.n, "validation_harmonic_mean": score}
        if progress.best_score is None or score > progress.best_score:
            progress.best_score, progress.best_step = score, progress.step
            if run.accelerator.is_main_process:
                write_model_folder(model, run.paths.checkpoints / "best")
            run.accelerator.wait_for_everyone()
    run.log.write({"phase": phase, "step": progress.step, "epoch": progress.epoch, **values}, run.images_logged)
    shown = ", ".join(
        f"{name.removeprefix('validation_')} {value:.3f}" for name, value in values.items() if name != "n"
    )
    if run.accelerator.is_main_process:
        tqdm.write(f"{phase} epoch {progress.epoch}, step {progress.step}, {counts.n} validation images: {shown}")


def count_validation(run: Run, split: ImageSplit, model: Backbone, *, attack: bool) -> Counts:
    """Counts on the validation images in the training's own precision, with the training's attack."""
    config = run.config
    if run.validation_loader is None:  # once a run: its worker processes outlive an evaluation
        run.validation_loader = run.accelerator.prepare(
            eval_loader(
                split, eval_transform(model.preprocessing), batch_size=config.batch_size, num_workers=run.num_workers
            )
        )
    settings = PgdSettings(config.norm, config.eps_value, config.step_size_value, config.attack_steps)
    return count_correct(
        model,
        run.validation_loader,
        run.accelerator,
        settings if attack else None,
        seed=config.seed,
        description="validation",
        total=split.num_examples,
        nested=True,
    )
