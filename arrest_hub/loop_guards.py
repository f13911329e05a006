"""What the loop checks while a run goes on, over all of its processes: skipped images, finite numbers."""

from __future__ import annotations

import json

from accelerate.utils import gather_object
from torch import nn
from tqdm import tqdm

from arrest_hub.checkpoint import Progress
from arrest_hub.corrupt import read_entries, too_many
from arrest_hub.files import end_last_line
from arrest_hub.guards import not_finite_tensor
from arrest_hub.processes import any_process, main_only, raise_together
from arrest_hub.progress import Meter
from arrest_hub.run import Run

FUTILE = 64
"""Skipped steps after which the gradients' scale, 2^16 at first and halved by each, is next to nothing."""


def report_corrupt(run: Run) -> None:
    """Say which images were skipped since the last call, and list them. Every process must call it.

    Raises ArrestError when all processes together found more than may be skipped, and as `main_only` does.
    """
    if run.corrupt is None or not run.corrupt.limit:
        return
    found = {entry["key"]: entry for entry in gather_object(run.corrupt.entries())}
    new = [entry for key, entry in found.items() if key not in run.corrupt_told]
    run.corrupt_told |= set(found)

    def tell() -> None:
        listed = {entry["key"] for entry in read_entries(run.paths.corrupt)}
        if run.paths.corrupt.is_file():
            end_last_line(run.paths.corrupt)
        with run.paths.corrupt.open("a", encoding="utf-8") as file:
            for entry in (entry for entry in new if entry["key"] not in listed):
                file.write(json.dumps(entry) + "\n")
                tqdm.write(f"skipped image {entry['path'] or entry['index']}: {entry['error']} ({run.paths.corrupt})")

    if new:  # in all of them alike
        main_only(run.accelerator, tell)
    excess = len(found) > run.config.skip_corrupt
    raise_together(run.accelerator, too_many(list(found.values()), run.config.skip_corrupt) if excess else None)


def stop_unless_finite(run: Run, meter: Meter, progress: Progress, student: nn.Module) -> None:
    """Every process must call it. Raises ArrestError naming step, samples and term of what is NaN or infinite."""
    accelerator = run.accelerator
    problem = meter.first_not_finite()
    if problem is None:
        name = not_finite_tensor((*student.named_parameters(), *student.named_buffers()))
        problem = None if name is None else f"the weights {name} are not finite after step {progress.step}"
    if not any_process(accelerator, problem is not None):
        return
    where = f", on process {accelerator.process_index}" if accelerator.num_processes > 1 else ""
    cure = "a smaller --lr, or --warmup-epochs or --clip-grad 1" + (
        {"fp16": ", or --mixed-precision bf16", "bf16": ", or --mixed-precision no"}.get(run.config.mixed_precision, "")
    )
    raise_together(
        accelerator,
        None
        if problem is None
        else f"{problem} of the {progress.phase} phase{where}: training diverged. Checkpoints "
        f"from before are untouched, and lead here again with --resume: start anew with {cure}.",
    )


def stop_if_all_skipped(run: Run, progress: Progress, finished: bool) -> None:
    """Every process must call it. Raises ArrestError when no step of a phase that is finished, or has had `FUTILE`
    of them, changed the weights: their fp16 gradients were not finite, at any scale."""
    if progress.skipped < progress.step or not (finished or progress.step >= FUTILE):
        return
    raise_together(
        run.accelerator,
        f"none of the {progress.step} steps of the {progress.phase} phase changed the weights: in fp16 their gradients "
        "were infinite or NaN, and such steps are skipped. Start anew with --mixed-precision bf16, a smaller --lr, or, "
        "where there were but a few, more steps: each halves the scale of the gradients.",
    )


def warn(run: Run, phase: str, progress: Progress, text: str) -> None:
    """Say it above the bar, and keep it in log.jsonl."""
    run.log.write({"phase": phase, "step": progress.step, "epoch": progress.epoch, "warning": text}, run.images_logged)
    if run.accelerator.is_main_process:
        tqdm.write(text)
