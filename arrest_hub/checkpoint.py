"""What a checkpoint holds, how it is written (whole or not at all) and how a run goes on from it.

A checkpoint is a folder `checkpoints/<phase>-<step>` (`step-000500` in the robust phase) with Accelerate's state
(weights, optimizer, gradient scaler, random states of every process), the averaged weights if there are any,
`progress.json`, and `manifest.json`: size and SHA-256 of every other file. It is written under a temporary name and
renamed once all of it is on the disk. The best weights so far lie beside it in `best-<step>`, for as long as a
checkpoint names them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint import CheckpointException

from arrest_hub.processes import from_main, raise_together

PROGRESS = "progress.json"
MANIFEST = "manifest.json"
REPLACED = ".replaced"
"""Ends the name of a checkpoint while another takes its place."""
EMA = "ema.safetensors"


@dataclass
class Progress:
    """Where a run stands. ``batch`` counts the batches of ``epoch`` that are already trained on; ``seconds`` is the
    time of this phase so far, over every resumption. ``to_validate``: the validation that belongs to ``step`` is yet
    to come. ``first_accuracy``: the clean accuracy of the first line of the log. ``layout`` is how the batches are
    dealt out: what it says must be the same for a run to go on in the middle of an epoch. ``offset`` is added to
    ``step`` for the place in the learning rate schedule: not zero once a run went on with other global batches, and so
    with other steps per epoch. ``epoch_steps``: the steps of an epoch that warm-up and averaging go by. ``images``: how
    many were trained on so far, over all phases. ``skipped``: steps that changed nothing, since their fp16 gradients
    were not finite. ``clean_counts``: of this epoch's clean images, how many were right, were looked at, and were
    replayed, in all processes. ``sharded``: the checkpoint is in parts, by FSDP. ``drawn_from``: what tells the split
    that the test images were held out of, as in `subsets.ImageSplit`. ``earlier``: the layouts that the
    phase had before this one, each with the number of its last step."""

    phase: str
    step: int = 0
    epoch: int = 0
    batch: int = 0
    offset: int = 0
    to_validate: bool = False
    first_accuracy: float | None = None
    best_score: float | None = None
    best_step: int | None = None
    model_revision: str | None = None
    dataset_revision: str | None = None
    drawn_from: str | None = None
    layout: dict[str, int] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    epoch_steps: int | None = None
    images: int = 0
    skipped: int = 0
    clean_counts: list[int] = dataclasses.field(default_factory=lambda: [0, 0, 0])
    sharded: bool | None = None
    earlier: list[dict[str, int]] = dataclasses.field(default_factory=list)

    @property
    def place(self) -> int:
        """Steps of the learning rate schedule that are done."""
        return self.step + self.offset


def checkpoint_name(phase: str, step: int) -> str:
    """``step-000500`` for the robust phase, ``standard-000500`` for the clean one before it."""
    return f"{'step' if phase == 'robust' else phase}-{step:06d}"


def best_folder(folder: Path, step: int) -> Path:
    """Where in a run's `checkpoints/` the weights of ``step`` are kept while they are the best."""
    return folder / f"best-{step:06d}"


def save_checkpoint(
    accelerator: Accelerator, folder: Path, progress: Progress, ema: nn.Module | None, keep: int
) -> Path:
    """Write a checkpoint into ``folder`` (the run's `checkpoints/`) and drop all but the ``keep`` newest of its phase
    and the newest from the end of an epoch, from which alone a run goes on with other processes.

    Every process must call it. Raises ArrestError when it cannot be written (a full disk), leaving earlier ones
    untouched.
    """
    final = folder / checkpoint_name(progress.phase, progress.step)
    temporary = folder / f"{final.name}.tmp"

    def begin() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def complete() -> None:
        if ema is not None:
            save_file({name: value.contiguous() for name, value in ema.state_dict().items()}, temporary / EMA)
        (temporary / PROGRESS).write_text(json.dumps(dataclasses.asdict(progress), indent=2) + "\n", encoding="utf-8")
        (temporary / MANIFEST).write_text(json.dumps(_describe(temporary), indent=2) + "\n", encoding="utf-8")
        flush_to_disk(temporary)
        replaced = final.with_name(final.name + REPLACED)
        if final.exists():  # validated since, or of a run that went on from an earlier one
            final.rename(replaced)
        temporary.rename(final)
        _flush(folder)
        shutil.rmtree(replaced, ignore_errors=True)
        # later ones are of a course that was given up: the run went on from an earlier one
        every = list_checkpoints(folder, progress.phase)
        for later in every[every.index(final) + 1 :]:
            _remove(later)
        drop_old(final, progress.phase, keep)

    main = accelerator.is_main_process
    # libraries have errors of their own for a full disk; whatever it is, it must not leave the others waiting
    for part in (begin if main else None, lambda: accelerator.save_state(str(temporary)), complete if main else None):
        problem = None
        try:
            if part is not None:
                part()
        except (Exception, CheckpointException) as error:  # the latter, of sharded ones, is no Exception
            text = str(error).strip()
            lines = text.splitlines()[-1:] if isinstance(error, CheckpointException) else text.split()
            problem = (
                f"the checkpoint {final} cannot be written: {' '.join(lines) or type(error).__name__}"
                f"{_free(folder)}. "
                "Earlier ones are untouched: make room for it, then go on with the same command and --resume."
            )
            if main:
                shutil.rmtree(temporary, ignore_errors=True)
        raise_together(accelerator, problem)
    return final


def list_checkpoints(folder: Path, phase: str) -> list[Path]:
    """Checkpoints of a phase, oldest first. That they are whole is for `damage` to say."""
    prefix = checkpoint_name(phase, 0).rsplit("-", 1)[0]
    found = [path for path in folder.glob(f"{prefix}-*") if re.fullmatch(rf"{prefix}-\d+", path.name)]
    return sorted(
        (path for path in found if (path / MANIFEST).is_file()), key=lambda path: int(path.name.split("-")[1])
    )


def drop_old(newest: Path, phase: str, keep: int) -> None:
    """Delete the checkpoints of ``phase`` before ``newest``, but for the last ``keep`` with it and the newest from the
    end of an epoch, and the best weights that none names then.

    A run that goes on does it too: one that was killed after its last checkpoint, and before this, kept one too many.
    """
    every = list_checkpoints(newest.parent, phase)
    until = every[: every.index(newest) + 1]
    ends = [checkpoint for checkpoint in until if _ends_epoch(checkpoint)]
    for old in set(until) - {*until[-keep:], *ends[-1:]}:
        _remove(old)
    drop_best(newest.parent)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint: a file that is missing, or is not what was written. None: it is whole."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        for name, (size, sha256) in manifest.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} of {size:,} bytes"
            if _sha256(path) != sha256:
                return f"{name} does not have the contents that were written"
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"{MANIFEST} or a file in it cannot be read ({error})"
    return None


def newest_whole(
    accelerator: Accelerator, folder: Path, phase: str, suits: Callable[[Progress], bool] = lambda progress: True
) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a phase that is whole and ``suits``, and a sentence for each damaged one passed over.

    Every process must call it; the main process looks.
    """

    def look() -> tuple[Path | None, list[str]]:
        passed_over = []
        for checkpoint in reversed(list_checkpoints(folder, phase)):
            problem = damage(checkpoint)
            if problem is not None:
                passed_over.append(f"{checkpoint} is damaged ({problem}): looking for an earlier one")
            elif suits(read_progress(checkpoint)):
                return checkpoint, passed_over
        return None, passed_over

    return from_main(accelerator, look)


def read_progress(checkpoint: Path) -> Progress:
    """The `progress.json` of a checkpoint."""
    return Progress(**json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8")))


def readable_progress(folder: Path, phase: str) -> list[Progress]:
    """What the checkpoints of a phase say of themselves, oldest first, without those too damaged to say it."""
    found = []
    for checkpoint in list_checkpoints(folder, phase):
        try:
            found.append(read_progress(checkpoint))
        except (OSError, ValueError, TypeError):
            continue
    return found


def _free(folder: Path) -> str:
    """How much room there is, for an error's text; nothing where the folder is gone too."""
    try:
        return f" ({shutil.disk_usage(folder).free / 1e6:,.0f} MB are free there)"
    except OSError:
        return ""


def _ends_epoch(checkpoint: Path) -> bool:
    """Whether a checkpoint is from the end of an epoch, as far as can be read."""
    try:
        return read_progress(checkpoint).batch == 0
    except (OSError, ValueError, TypeError):
        return False


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, ema: nn.Module | None) -> Progress:
    """Load a checkpoint into the prepared model, optimizer, scaler, random states and the averaged weights."""
    accelerator.load_state(str(checkpoint))
    if ema is not None:
        ema.load_state_dict(load_file(checkpoint / EMA))
    return read_progress(checkpoint)


def put_back_replaced(folder: Path) -> None:
    """Where a run was killed between taking the name of a checkpoint, or of `export/`, and giving it to the new one:
    give the old one its name back."""
    for path in folder.glob(f"*{REPLACED}"):
        final = path.with_name(path.name.removesuffix(REPLACED))
        if final.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(final)


def remove_leftovers(folder: Path, *patterns: str) -> None:
    """Delete the folders, of these names, that a killed run was writing and that have no final name yet."""
    for path in (path for pattern in patterns for path in folder.glob(pattern)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def drop_best(folder: Path, newest: int | None = None) -> None:
    """Delete the best weights that no checkpoint names, but for those of the step ``newest``."""
    steps = {newest} | {progress.best_step for progress in readable_progress(folder, "robust")}
    wanted = {best_folder(folder, step).name for step in steps if step is not None}
    for path in folder.glob("best-*"):
        if path.name not in wanted:
            _remove(path)


def _remove(folder: Path) -> None:
    """Delete a folder so that whoever looks meanwhile sees all of it or nothing."""
    aside = folder.with_name(f"{folder.name}.old.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside)


def _describe(folder: Path) -> dict[str, Any]:
    """Size and SHA-256 of every file in a folder, by its path there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): (path.stat().st_size, _sha256(path)) for path in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_to_disk(folder: Path) -> None:
    """Make the files durable before the rename publishes them: a rename may otherwise outrun their contents."""
    for path in [*folder.rglob("*"), folder]:
        _flush(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
