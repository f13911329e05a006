"""From where a run goes on: which checkpoint, and what is no longer the same if its processes are other ones."""

from __future__ import annotations

from accelerate import Accelerator

from arrest_hub.checkpoint import Progress, newest_whole, read_progress
from arrest_hub.config import FinetuneConfig
from arrest_hub.errors import ConfigError
from arrest_hub.run_folder import RunPaths

NAMES = {
    "processes": "number of processes",
    "batch_size": "--batch-size",
    "grad_accum_steps": "--grad-accum-steps",
}


def batch_layout(config: FinetuneConfig, accelerator: Accelerator, workers: int) -> dict[str, int]:
    """How the batches of an epoch are dealt out. A stream's order depends on who reads it, too (``workers``: the data
    loading processes of each process)."""
    layout = {
        "processes": accelerator.num_processes,
        "batch_size": config.batch_size,
        "grad_accum_steps": config.grad_accum_steps,
    }
    return layout | ({"workers": workers} if config.streaming else {})


def resume_point(
    config: FinetuneConfig, paths: RunPaths, accelerator: Accelerator, phase: str, workers: int
) -> tuple[Progress | None, str | None, list[str]]:
    """Where a phase goes on: (progress, its checkpoint, sentences to print); None where it starts from the beginning.

    Damaged checkpoints are passed over. Where the batches are dealt out in another way than before, the run goes on
    from the end of an epoch. A stream goes on with the data loading processes it began with, whatever ``workers`` is
    now: a machine with other cores has another default.

    Raises:
        ConfigError: there is no such checkpoint.
    """
    if not config.resume:
        return None, None, []
    checkpoint, notes = newest_whole(accelerator, paths.checkpoints, phase)
    if checkpoint is None:
        if notes:
            notes.append("no checkpoint is whole: starting this phase from the beginning")
        return None, None, notes
    progress = read_progress(checkpoint)
    before = progress.layout.get("workers", workers)
    if config.streaming and before != workers:
        notes.append(
            f"data loading processes: {before}, as before, and not {workers}: a stream's order depends on them"
        )
    layout = batch_layout(config, accelerator, before)
    if progress.layout == layout:
        return progress, str(checkpoint), notes
    changes = ", ".join(
        f"{NAMES[key]} {progress.layout.get(key)} then and {layout.get(key)} now"
        for key in NAMES
        if progress.layout.get(key) != layout.get(key)
    )
    middle = progress
    if progress.batch:
        checkpoint, _ = newest_whole(accelerator, paths.checkpoints, phase, lambda found: not found.batch)
        if checkpoint is None:
            raise ConfigError(
                f"cannot resume: {changes}, and {paths.checkpoints} has no checkpoint from the end of an epoch, where "
                "alone that may change. Resume as before until the next one, or start anew with another --output-dir."
            )
        progress = read_progress(checkpoint)
        notes.append(
            f"going back from step {middle.step} to {progress.step}, the end of an epoch: the batches of the one after "
            "it would be others"
        )
    notes.append(
        f"{changes}: every image is still seen once an epoch, but the result is no longer that of a run without the "
        "change (other batches, attack starts and BatchNorm statistics; with another global batch also other steps "
        "per epoch, the learning rate's schedule staying with the epochs)"
    )
    return progress, str(checkpoint), notes
