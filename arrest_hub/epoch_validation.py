"""The validation at the end of an epoch: counts on the validation images, and the best weights so far kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from tqdm import tqdm

from arrest_hub.backbones import Backbone
from arrest_hub.checkpoint import Progress, best_folder, drop_best
from arrest_hub.data import ImageSplit, eval_loader
from arrest_hub.results import harmonic_mean
from arrest_hub.run import Run
from arrest_hub.sharding import is_sharded
from arrest_hub.step import refresh, validation_attack
from arrest_hub.transforms import eval_transform
from arrest_hub.validation import Counts, count_correct


def validate(
    run: Run,
    phase: str,
    model: Backbone,
    validated: nn.Module,
    progress: Progress,
    after_batch: Callable[[], None],
) -> Counts:
    """Clean accuracy, and in the robust phase PGD accuracy, on the validation images; keeps the best weights.

    The test split plays no part in the choice. ``validated``: ``model``, or what `for_eval_passes` made of it.
    """
    assert run.splits.validation is not None
    refresh(validated)
    transform = eval_transform(model.preprocessing)
    counts = count_validation(run, run.splits.validation, transform, validated, phase == "robust", after_batch)
    values: dict[str, Any] = {"validation_clean_accuracy": counts.clean / counts.n, "n": counts.n}
    if phase == "robust":
        score = harmonic_mean(counts.clean / counts.n, counts.robust / counts.n)
        values |= {"validation_robust_accuracy": counts.robust / counts.n, "validation_harmonic_mean": score}
        if progress.best_score is None or score > progress.best_score:
            progress.best_score, progress.best_step = score, progress.step
            run.write(model, best_folder(run.paths.checkpoints, progress.step))
            if run.accelerator.is_main_process:
                drop_best(run.paths.checkpoints, progress.step)
    run.log.write({"phase": phase, "step": progress.step, "epoch": progress.epoch, **values}, run.images_logged)
    shown = ", ".join(
        f"{name.removeprefix('validation_')} {value:.3f}" for name, value in values.items() if name != "n"
    )
    if run.accelerator.is_main_process:
        tqdm.write(f"{phase} epoch {progress.epoch}, step {progress.step}, {counts.n} validation images: {shown}")
    return counts


def count_validation(
    run: Run,
    split: ImageSplit,
    transform: Callable[[Any], Any],
    network: nn.Module,
    attack: bool,
    after_batch: Callable[[], None],
) -> Counts:
    """Counts on the validation images in the training's own precision, with the training's attack."""
    config = run.config
    if run.validation_loader is None:  # once a run: its worker processes outlive an evaluation
        run.validation_loader = run.accelerator.prepare(
            eval_loader(split, transform, batch_size=config.batch_size, num_workers=run.num_workers)
        )
    settings = validation_attack(config, run.images_at_once)
    return count_correct(
        network,
        run.validation_loader,
        run.accelerator,
        settings if attack else None,
        seed=config.seed,
        description="validation",
        total=split.num_examples,
        nested=True,
        after_batch=after_batch,
        # the size of a training batch: passes of a compiled network are then of one size in all of the run
        fill_to=int(config.batch_size) if config.compile or is_sharded(run.accelerator) else None,
    )
