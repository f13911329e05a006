"""The one training loop: batches -> objective -> optimizer, with logging, validation, checkpoints and resumption."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from tqdm import tqdm

from arrest_hub.backbones import Backbone
from arrest_hub.checkpoint import Progress, drop_old, load_checkpoint, save_checkpoint
from arrest_hub.epoch_batches import (
    check_epoch,
    count_batches,
    dead_workers_reported,
    epoch_batches,
    training_batches,
)
from arrest_hub.epoch_validation import validate
from arrest_hub.errors import ArrestError, Terminated
from arrest_hub.guards import REPLAYED, at_chance, collapse_warning, replay_warning
from arrest_hub.loop_guards import report_corrupt, stop_if_all_skipped, stop_unless_finite, warn
from arrest_hub.objective import Objective
from arrest_hub.out_of_memory import full_memory_told
from arrest_hub.processes import AnyProcessBefore, any_process, main_only
from arrest_hub.progress import Meter, progress_bar
from arrest_hub.resume import batch_layout, layout_note, resume_point
from arrest_hub.run import Run
from arrest_hub.run_folder import record_batches
from arrest_hub.schedule import Schedule
from arrest_hub.seeding import derive_seed
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
from arrest_hub.stopping import Termination, watch_for_termination
from arrest_hub.throughput import Pace, Utilisation

# far above the cross-entropy that a confident network can have at its first adversarial batch
DIVERGED = 1e5
TOO_LITTLE_MEMORY = (
    "a step of {} images is too large. Go on with --resume, a smaller --batch-size and as much more of "
    "--grad-accum-steps, or start anew with --grad-checkpointing or --mixed-precision bf16. --dry-run says what fits."
)


class TrainingPhase:
    """A phase of a run under way in this process: ``student`` is trained in place for ``epochs`` or ``max_steps``.

    Every random draw is seeded by where the run stands, so a resumed run continues bit for bit (on a CPU). With
    --resume it begins where the newest whole checkpoint of this phase is.

    Raises:
        ArrestError: training diverges, or a checkpoint cannot be written. DataError: an image cannot be read.
            ConfigError: there is no checkpoint from which the run can go on so. Terminated: after a SIGTERM or Ctrl-C,
            with a checkpoint written.
    """

    bar: tqdm
    termination: Termination

    def __init__(
        self,
        run: Run,
        phase: str,
        student: Backbone,
        objective: Objective,
        *,
        epochs: int,
        lr: float,
        max_steps: int | None,
        ema: ModelEmaV3 | None,
    ) -> None:
        self.run, self.phase, self.student, self.objective, self.ema = run, phase, student, objective, ema
        config, accelerator = run.config, run.accelerator
        saved, checkpoint, notes = resume_point(config, run.paths, accelerator, phase, run.num_workers)
        for note in notes:
            accelerator.print(note)
        # the order of a stream depends on how many processes read it
        workers = run.num_workers if saved is None else saved.layout.get("workers", run.num_workers)
        self.loader = training_batches(run, student, workers, phase)
        self.batches_per_epoch = count_batches(run, self.loader)
        self.steps_per_epoch = self.batches_per_epoch // config.grad_accum_steps if self.batches_per_epoch else None
        if self.steps_per_epoch is not None:
            whole = epochs * self.steps_per_epoch
            self.total_steps = min(max_steps or whole, whole)
            by_epochs = self.total_steps == whole
        else:
            assert max_steps is not None  # checked in prepare_data
            self.total_steps, by_epochs = max_steps, False
        if saved is not None and saved.epoch_steps:
            before = max_steps is None or epochs * saved.epoch_steps <= max_steps
            if before != by_epochs:
                ends = {True: f"--epochs {epochs}", False: f"--max-steps {max_steps}"}
                accelerator.print(
                    f"with these batches {ends[by_epochs]} ends the run, not {ends[before]}: the learning rate is that "
                    f"of its share of {self.total_steps} steps"
                )
        # where steps set the end, what is given in epochs stays where the run began with it, in steps
        epoch_steps = self.steps_per_epoch if saved is None or by_epochs else saved.epoch_steps or self.steps_per_epoch
        optimizer = make_optimizer(config, student, lr)
        self.schedule = Schedule(config, optimizer, self.total_steps, epoch_steps, robust=phase == "robust")
        size, device, precision = student.preprocessing.size, accelerator.device, config.mixed_precision
        utilisation = Utilisation(student, size, objective.passes, device, precision, accelerator.num_processes)
        if is_sharded(accelerator):
            run.twin = WholeCopy(accelerator, student)
            choose_blocks(accelerator, student)
        self.model, self.optimizer = accelerator.prepare(student, optimizer)
        layout = batch_layout(config, accelerator, workers)
        self.progress = Progress(
            phase, model_revision=run.model_origin, dataset_revision=run.dataset_origin, layout=layout,
            sharded=is_sharded(accelerator), drawn_from=run.splits.test.drawn_from,
        )  # fmt: skip
        if checkpoint is not None:
            self._restore(Path(checkpoint), layout, by_epochs)
        progress = self.progress
        progress.epoch_steps = epoch_steps
        if config.resume:
            run.log.rewind(phase, progress.step)
            if not self.finished:
                main_only(accelerator, lambda: record_batches(config, run.paths))
        self.began = time.perf_counter() - progress.seconds
        self.schedule.set_learning_rate(progress.place)
        if ema is not None:
            ema.update_after_step = self.schedule.average_after
        self.recomputed = recomputed_statistics(config, student)
        self.perturbation = make_perturbation(config, accelerator, student) if phase == "robust" else None

        self.attacked = attacked_network(config, accelerator, student, objective)
        self.validated = self.attacked if ema is None else for_eval_passes(config, ema.module)
        self.generator = torch.Generator(device=accelerator.device)
        self.meter, self.pace = Meter(), Pace(accelerator.device, utilisation)
        objective.clock = self.pace.stopwatch
        self.written: tuple[Progress, Path] | None = None
        self.told = AnyProcessBefore(accelerator)
        # of this epoch's images, in this process: correct when clean, looked at, replayed
        self.clean = torch.zeros(3, device=accelerator.device)
        if accelerator.is_main_process:
            kept = [*progress.clean_counts, 0][:3]  # of an earlier version the first two
            self.clean += torch.tensor(kept, device=accelerator.device)

    @property
    def finished(self) -> bool:
        """Whether all steps are done; a validation may be left."""
        return self.progress.place >= self.total_steps

    @property
    def last_step(self) -> int:
        """The number of the phase's last step: of those that were counted, whatever their batches were."""
        return self.total_steps - self.progress.offset

    def _restore(self, checkpoint: Path, layout: dict[str, int], by_epochs: bool) -> None:
        """Go on from a checkpoint, whose batches may have been dealt out otherwise than by ``layout``."""
        run, config, accelerator = self.run, self.run.config, self.run.accelerator
        progress = self.progress = load_checkpoint(accelerator, checkpoint, self.ema)
        progress.drawn_from = run.splits.test.drawn_from  # an image may have been repaired since
        if accelerator.is_main_process:
            drop_old(checkpoint, self.phase, config.keep_checkpoints)
        accelerator.step = 0  # a checkpoint is of whole steps, and --grad-accum-steps may be another now
        if progress.layout != layout:
            # the schedule goes by epochs, or by the steps that --max-steps counts
            progress.offset = progress.epoch * (self.steps_per_epoch or 0) - progress.step if by_epochs else 0
            if not self.finished:  # something is trained with the new one
                accelerator.print(layout_note(progress.layout, layout))
                progress.earlier.append(progress.layout | {"until": progress.step})
                progress.layout = layout
        accelerator.print(f"resuming from {checkpoint} ({self.phase} phase, step {progress.step} of {self.last_step})")
        run.images_logged = progress.images

    def train(self) -> Progress:
        """The epochs that are left, each with its validation and checkpoint."""
        config, accelerator, progress = self.run.config, self.run.accelerator, self.progress
        self.model.train()
        images = config.batch_size * accelerator.num_processes * config.grad_accum_steps
        done, total = progress.place * images, self.total_steps * images
        # the bar is closed before an error is printed
        with (
            full_memory_told(TOO_LITTLE_MEMORY.format(config.batch_size)),
            watch_for_termination() as self.termination,
            dead_workers_reported(),
            progress_bar(total, done, self.phase, accelerator) as self.bar,
        ):
            due = True  # of a checkpoint at the end of this epoch
            while progress.to_validate or not self.finished:
                if not progress.to_validate:
                    due = self._train_epoch()
                self._look_back()
                if self.finished or due:
                    self._save()
                self._stop_if_asked(now=True)
        return progress

    def _train_epoch(self) -> bool:
        """The rest of an epoch; whether a checkpoint is due at its end."""
        config, accelerator, progress = self.run.config, self.run.accelerator, self.progress
        every = config.checkpoint_every
        for batch in self.pace.waiting.over(epoch_batches(accelerator, self.loader, progress, self.batches_per_epoch)):
            self._train_batch(batch)
            if not accelerator.sync_gradients:
                continue
            self._count_step()
            if self.finished:
                break
            # at the end of an epoch it is written later, when the epoch's validation is part of it
            if progress.batch != self.batches_per_epoch:
                if every and progress.step % every == 0:
                    self._save()
                self._stop_if_asked()
        check_epoch(config, progress, self.steps_per_epoch)
        if progress.batch % config.grad_accum_steps:  # a stream has ended in the middle of a step
            self.model.zero_grad()
            accelerator.step = 0
        steps = progress.batch // config.grad_accum_steps
        progress.epoch += 1
        progress.batch = 0
        validated = config.eval_every and (progress.epoch % config.eval_every == 0 or self.finished)
        progress.to_validate = bool(validated and self.run.splits.validation is not None)
        return not every or progress.step // every > (progress.step - steps) // every

    def _train_batch(self, batch: dict[str, torch.Tensor]) -> None:
        config, accelerator, progress, objective = self.run.config, self.run.accelerator, self.progress, self.objective
        seed_parts = (config.seed, self.phase, progress.epoch, progress.batch, accelerator.process_index)
        self.generator.manual_seed(derive_seed("attack", *seed_parts))
        torch.manual_seed(derive_seed("dropout", *seed_parts))
        objective.attack_steps = config.attack_steps_at(progress.place / self.total_steps)
        with self.pace.stopwatch("step"):
            parts = train_step(
                accelerator, self.model, self.attacked, objective, self.optimizer, batch, self.generator,
                config.clip_grad, self.perturbation, self.recomputed,
            )  # fmt: skip
        average_statistics(accelerator, self.student)
        self.meter.add(parts, progress.step + 1, batch["index"])
        if (hits := parts.get("clean_correct")) is not None:
            replayed = parts.get("replayed", torch.zeros_like(hits))
            self.clean += torch.stack([hits.sum(), torch.ones_like(hits).sum(), replayed.sum()])
        progress.batch += 1
        images = config.batch_size * accelerator.num_processes
        self.pace.add(images)
        self.bar.update(images)

    def _count_step(self) -> None:
        """After an optimizer's step: the schedule, the averaged weights, and a line of the log where one is due."""
        run, accelerator, progress = self.run, self.run.accelerator, self.progress
        progress.step += 1
        progress.skipped += accelerator.optimizer_step_was_skipped
        lr = self.optimizer.param_groups[0]["lr"]  # this step's
        self.schedule.set_learning_rate(progress.place)
        if self.ema is not None:
            self.ema.update(self.student, step=progress.place)
        if progress.step % run.config.log_every and not self.finished:
            return
        report_corrupt(run)
        stop_unless_finite(run, self.meter, progress, self.student)
        stop_if_all_skipped(run, progress, self.finished)
        values = self.meter.reduce(accelerator)
        run.images_logged += self.pace.images
        values["lr"] = lr
        if accelerator.scaler is not None:
            values["skipped_steps"] = progress.skipped
        values |= self.pace.read(values.get("attack_steps", 0.0))
        _log(run, self.phase, progress, values, self.bar)
        if progress.first_accuracy is None:
            progress.first_accuracy = values.get("clean_accuracy")

    def _look_back(self) -> None:
        """At the end of an epoch: its validation if one is due, and a warning if the network has collapsed."""
        run, progress, classes = self.run, self.progress, self.student.num_classes
        stop_unless_finite(run, self.meter, progress, self.student)
        correct, seen, replayed = self._clean_counts()
        if replayed > REPLAYED * seen:
            warn(run, self.phase, progress, replay_warning(replayed / seen, run.config.replay_threshold))
        if progress.to_validate:
            weights = self.student if self.ema is None else self.ema.module
            with self.pace.paused():
                counts = validate(run, self.phase, weights, self.validated, progress, self._stop_if_asked)
            progress.to_validate = False
            if not seen:  # not every method looks at the clean images
                correct, seen = counts.clean, counts.n
            self.model.train()
        if at_chance(correct, seen, classes):
            text = collapse_warning(
                correct / seen, progress.first_accuracy, classes, self.phase == "standard",
                0 if run.config.init == "random" else run.config.standard_epochs,
            )  # fmt: skip
            warn(run, self.phase, progress, text)
        self.clean.zero_()

    def _clean_counts(self) -> list[int]:
        """Of this epoch's clean images in all processes: how many were right, were looked at, were replayed."""
        return [int(count) for count in self.run.accelerator.reduce(self.clean, "sum").tolist()]

    def _save(self) -> Path:
        """Write a checkpoint, unless this one is written; where it is."""
        run, progress = self.run, self.progress
        if self.written is None or self.written[0] != progress:
            report_corrupt(run)
            stop_unless_finite(run, self.meter, progress, self.student)
            progress.seconds = time.perf_counter() - self.began
            progress.images = run.images_logged + self.pace.images
            progress.clean_counts = self._clean_counts()
            path = save_checkpoint(
                run.accelerator, run.paths.checkpoints, progress, self.ema, run.config.keep_checkpoints
            )
            self.written = dataclasses.replace(progress), path
        return self.written[1]

    def _stop_if_asked(self, now: bool = False) -> None:
        """Raises Terminated, with a checkpoint written, once any process was told to stop; of several processes a call
        later, unless ``now``, which waits for the device."""
        asked = self.termination.asked
        if any_process(self.run.accelerator, asked) if now else self.told(asked):
            by = "Ctrl-C" if self.termination.exit_code == 130 else "SIGTERM"
            raise Terminated(
                f"stopped by {by} at step {self.progress.step} of {self.last_step}; {self._save()} is written. Go "
                "on with the same command and --resume.",
                self.termination.exit_code,
            )


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
