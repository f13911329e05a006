"""The one training loop: batches -> objective -> optimizer, with logging, validation, checkpoints and resumption."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from timm.utils import ModelEmaV3

from arrest_hub.backbones import Backbone
from arrest_hub.checkpoint import Progress, derive_seed, drop_old, load_checkpoint, save_checkpoint
from arrest_hub.checks import report_corrupt, stop_if_all_skipped, stop_unless_finite, warn
from arrest_hub.config import FinetuneConfig
from arrest_hub.data import StreamingImages, train_loader
from arrest_hub.epoch_validation import validate
from arrest_hub.errors import ArrestError, ConfigError, DataError, Terminated
from arrest_hub.guards import at_chance, collapse_warning
from arrest_hub.objective import Objective
from arrest_hub.processes import any_process, main_only
from arrest_hub.progress import Meter, progress_bar
from arrest_hub.resume import batch_layout, resume_point
from arrest_hub.run import Run
from arrest_hub.run_folder import record_batches
from arrest_hub.schedule import Schedule, check_accumulation
from arrest_hub.sharding import WholeCopy, choose_blocks, is_sharded
from arrest_hub.step import (
    attacked_network,
    average_statistics,
    for_eval_passes,
    make_optimizer,
    make_perturbation,
    recomputed_statistics,
    train_step,
)
from arrest_hub.stopping import watch_for_termination
from arrest_hub.throughput import Pace, Utilisation
from arrest_hub.transforms import train_transform

# far above the cross-entropy that a confident network can have at its first adversarial batch
DIVERGED = 1e5


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
    Raises ArrestError if training diverges or a checkpoint cannot be written, DataError if an image cannot be read,
    Terminated after a SIGTERM or Ctrl-C, with a checkpoint written.
    """
    config, accelerator = run.config, run.accelerator
    saved, checkpoint, notes = resume_point(config, run.paths, accelerator, phase, run.num_workers)
    for note in notes:
        accelerator.print(note)
    # the order of a stream depends on how many processes read it
    workers = run.num_workers if saved is None else saved.layout.get("workers", run.num_workers)
    loader = training_batches(run, student, workers, phase)
    batches_per_epoch = _batches_per_epoch(run, loader)
    steps_per_epoch = batches_per_epoch // config.grad_accum_steps if batches_per_epoch else None
    if steps_per_epoch is not None:
        total_steps = min(max_steps or epochs * steps_per_epoch, epochs * steps_per_epoch)
        by_epochs = total_steps == epochs * steps_per_epoch
    else:
        assert max_steps is not None  # checked in prepare_data
        total_steps, by_epochs = max_steps, False
    # where steps set the end, what is given in epochs stays where the run began with it, in steps
    epoch_steps = steps_per_epoch if saved is None or by_epochs else saved.epoch_steps or steps_per_epoch
    optimizer = make_optimizer(config, student, lr)
    schedule = Schedule(config, optimizer, total_steps, epoch_steps, robust=phase == "robust")
    size, device, precision = student.preprocessing.size, accelerator.device, config.mixed_precision
    utilisation = Utilisation(student, size, objective.passes, device, precision, accelerator.num_processes)
    if is_sharded(accelerator):
        run.twin = WholeCopy(accelerator, student)
        choose_blocks(accelerator, student)
    model, optimizer = accelerator.prepare(student, optimizer)
    layout = batch_layout(config, accelerator, workers)
    progress = Progress(phase, model_revision=run.model_revision, dataset_revision=run.splits.revision, layout=layout)
    if checkpoint is not None:
        progress = load_checkpoint(accelerator, Path(checkpoint), ema)
        if accelerator.is_main_process:
            drop_old(Path(checkpoint), phase, config.keep_checkpoints)
        accelerator.step = 0  # a checkpoint is of whole steps, and --grad-accum-steps may be another now
        if progress.layout != layout:
            # the schedule goes by epochs, or by the steps that --max-steps counts
            progress.offset = progress.epoch * (steps_per_epoch or 0) - progress.step if by_epochs else 0
            if progress.place < total_steps:  # something is trained with the new one
                progress.layout = layout
        accelerator.print(f"resuming from {checkpoint} ({phase} phase, step {progress.place} of {total_steps})")
        run.images_logged = progress.images
    progress.epoch_steps = epoch_steps
    if config.resume:
        run.log.rewind(phase, progress.step)
        if progress.place < total_steps:
            main_only(accelerator, lambda: record_batches(config, run.paths))
    began = time.perf_counter() - progress.seconds
    schedule.set_learning_rate(progress.place)
    if ema is not None:
        ema.update_after_step = schedule.average_after
    recomputed = recomputed_statistics(config, student)
    perturbation = make_perturbation(config, accelerator, student) if phase == "robust" else None

    attacked = attacked_network(config, accelerator, student, objective)
    validated = attacked if ema is None else for_eval_passes(config, ema.module)
    generator = torch.Generator(device=accelerator.device)
    meter, pace = Meter(), Pace(accelerator.device, utilisation)
    objective.clock = pace.stopwatch
    images = config.batch_size * accelerator.num_processes
    model.train()
    done, total = (steps * config.grad_accum_steps * images for steps in (progress.place, total_steps))

    written: tuple[Progress, Path] | None = None
    due_at_end = True  # of a checkpoint at the end of this epoch
    clean = torch.zeros(2, device=accelerator.device)  # correct, seen in this epoch, by this process
    if accelerator.is_main_process:
        clean += torch.tensor(progress.clean_counts, device=accelerator.device)

    def save() -> Path:
        nonlocal written
        if written is None or written[0] != progress:
            report_corrupt(run)
            stop_unless_finite(run, meter, progress, student)
            progress.seconds, progress.images = time.perf_counter() - began, run.images_logged + pace.images
            progress.clean_counts = [int(count) for count in accelerator.reduce(clean, "sum").tolist()]
            path = save_checkpoint(accelerator, run.paths.checkpoints, progress, ema, config.keep_checkpoints)
            written = dataclasses.replace(progress), path
        return written[1]

    def stop_if_asked() -> None:
        if any_process(accelerator, termination.asked):
            by = "Ctrl-C" if termination.exit_code == 130 else "SIGTERM"
            raise Terminated(
                f"stopped by {by} at step {progress.place} of {total_steps}; {save()} is written. Go on with the "
                "same command and --resume.",
                termination.exit_code,
            )

    # the bar is closed before an error is printed
    with (
        watch_for_termination() as termination,
        _dead_workers_reported(),
        progress_bar(total, done, phase, accelerator) as bar,
    ):
        while progress.to_validate or progress.place < total_steps:
            if not progress.to_validate:
                for batch in pace.waiting.over(_epoch_batches(accelerator, loader, progress, batches_per_epoch)):
                    seed_parts = (config.seed, phase, progress.epoch, progress.batch, accelerator.process_index)
                    generator.manual_seed(derive_seed("attack", *seed_parts))
                    torch.manual_seed(derive_seed("dropout", *seed_parts))
                    objective.attack_steps = config.attack_steps_at(progress.place / total_steps)
                    with pace.stopwatch("step"):
                        parts = train_step(
                            accelerator, model, attacked, objective, optimizer, batch, generator, config.clip_grad,
                            perturbation, recomputed,
                        )  # fmt: skip
                    average_statistics(accelerator, student)
                    meter.add(parts, progress.place + 1, batch["index"])
                    if (hits := parts.get("clean_correct")) is not None:
                        clean += torch.stack([hits.sum(), torch.ones_like(hits).sum()])
                    progress.batch += 1
                    pace.add(images)
                    bar.update(images)
                    if not accelerator.sync_gradients:
                        continue
                    progress.step += 1
                    progress.skipped += accelerator.optimizer_step_was_skipped
                    schedule.set_learning_rate(progress.place)
                    if ema is not None:
                        ema.update(student, step=progress.place)
                    finished = progress.place >= total_steps
                    if progress.step % config.log_every == 0 or finished:
                        report_corrupt(run)
                        stop_unless_finite(run, meter, progress, student)
                        stop_if_all_skipped(run, progress, finished)
                        values = meter.reduce(accelerator)
                        run.images_logged += pace.images
                        values["lr"] = optimizer.param_groups[0]["lr"]
                        if accelerator.scaler is not None:
                            values["skipped_steps"] = progress.skipped
                        values |= pace.read(values.get("attack_steps", 0.0))
                        _log(run, phase, progress, values, bar)
                        if progress.first_accuracy is None:
                            progress.first_accuracy = values.get("clean_accuracy")
                    if finished:
                        break
                    # at the end of an epoch it is written below, when the epoch's validation is part of it
                    if progress.batch != batches_per_epoch:
                        if config.checkpoint_every and progress.step % config.checkpoint_every == 0:
                            save()
                        stop_if_asked()
                _check_epoch(config, progress, steps_per_epoch)
                if progress.batch % config.grad_accum_steps:  # a stream has ended in the middle of a step
                    model.zero_grad()
                    accelerator.step = 0
                every, steps = config.checkpoint_every, progress.batch // config.grad_accum_steps
                due_at_end = not every or progress.step // every > (progress.step - steps) // every
                progress.epoch += 1
                progress.batch = 0
                finished = progress.place >= total_steps
                due = config.eval_every and (progress.epoch % config.eval_every == 0 or finished)
                progress.to_validate = bool(due and run.splits.validation is not None)
            correct, seen = map(int, accelerator.reduce(clean, "sum").tolist())
            if progress.to_validate:
                weights = student if ema is None else ema.module
                with pace.paused():
                    counts = validate(run, phase, weights, validated, progress, stop_if_asked)
                progress.to_validate = False
                if not seen:  # not every method looks at the clean images
                    correct, seen = counts.clean, counts.n
                model.train()
            if at_chance(correct, seen, student.num_classes):
                warn(
                    run,
                    phase,
                    progress,
                    collapse_warning(correct / seen, progress.first_accuracy, student.num_classes, phase == "standard"),
                )
            clean.zero_()
            finished = progress.place >= total_steps
            if finished or due_at_end:
                save()
            stop_if_asked()
    return progress


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


def _batches_per_epoch(run: Run, loader: Any) -> int | None:
    """Batches of an epoch in each process, enough for whole steps; None for a stream of unknown length.

    Raises:
        ConfigError: they are not enough for one step.
    """
    if run.splits.train.num_examples is None:
        return None
    accumulated = run.config.grad_accum_steps
    check_accumulation(accumulated, len(loader))
    return len(loader) // accumulated * accumulated


def _check_epoch(config: FinetuneConfig, progress: Progress, steps_per_epoch: int | None) -> None:
    """At the end of an epoch. Raises ConfigError if a stream of unknown length was too short for a single step: no
    other epoch would be longer."""
    if steps_per_epoch is None and progress.batch < config.grad_accum_steps:
        raise ConfigError(
            f"the stream ended after {progress.batch} whole batches of {config.batch_size} images, and a step takes "
            f"{config.grad_accum_steps}: give a smaller --batch-size, --grad-accum-steps or --num-workers (each worker "
            "leaves out its last incomplete batch)."
        )


def _epoch_batches(
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


def _log(run: Run, phase: str, progress: Progress, values: dict[str, float], bar: Any) -> None:
    """A line of log.jsonl, the tracker and the bar; stops a run that has diverged."""
    if values["loss"] > DIVERGED:
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
    shares = {"attack": "attack_share", "training": "training_share", "teacher": "teacher_share", "data": "data_wait"}
    bar.set_postfix(
        {name.split("_")[0]: f"{value:.3g}" for name, value in shown.items()}
        | {name: f"{100 * values[key]:.0f} %" for name, key in shares.items() if key in values}
        | ({"MFU": f"{100 * values['mfu']:.0f} %"} if "mfu" in values else {})
    )
