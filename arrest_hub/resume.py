"""From where a run goes on: which checkpoint, and what is no longer the same if its processes are other ones."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from accelerate import Accelerator
from datasets import Dataset

from arrest_hub.checkpoint import Progress, newest_whole, read_progress, readable_progress
from arrest_hub.config import FinetuneConfig
from arrest_hub.data import Splits
from arrest_hub.errors import ConfigError
from arrest_hub.model_source import ModelSource, find_weights
from arrest_hub.run_folder import RunPaths
from arrest_hub.sharding import is_sharded
from arrest_hub.subsets import split_digest

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
    if progress.sharded is not None and progress.sharded != is_sharded(accelerator):
        launch = "recipes/accelerate/fsdp2.yaml" if progress.sharded else "another configuration of the launcher"
        raise ConfigError(
            f"cannot resume: {checkpoint} was written {'with' if progress.sharded else 'without'} FSDP, and this is a "
            f"run {'without' if progress.sharded else 'with'} it. Launch it as it began, with {launch}, or start anew "
            "with another --output-dir."
        )
    before = progress.layout.get("workers", workers)
    if config.streaming and before != workers:
        notes.append(
            f"data loading processes: {before}, as before, and not {workers}: a stream's order depends on them"
        )
    layout = batch_layout(config, accelerator, before)
    if progress.layout == layout:
        return progress, str(checkpoint), notes
    middle = progress
    if progress.batch:
        checkpoint, _ = newest_whole(accelerator, paths.checkpoints, phase, lambda found: not found.batch)
        if checkpoint is None:
            raise ConfigError(
                f"cannot resume: {_changes(middle.layout, layout)}, and {paths.checkpoints} has no checkpoint from the "
                "end of an epoch, where alone that may change. Resume as before until the next one, or start anew with "
                "another --output-dir."
            )
        progress = read_progress(checkpoint)
        notes.append(
            f"going back from step {middle.step} to {progress.step}, the end of an epoch: the batches of the one after "
            "it would be others"
        )
    return progress, str(checkpoint), notes


def _changes(before: dict[str, int], now: dict[str, int]) -> str:
    """What two layouts differ in, in words."""
    differing = [key for key in NAMES if before.get(key) != now.get(key)]
    return ", ".join(f"{NAMES[key]} {before.get(key)} then and {now.get(key)} now" for key in differing)


def layout_note(before: dict[str, int], now: dict[str, int]) -> str:
    """What to say where a run trains on with batches that are dealt out in another way than before."""
    return (
        f"{_changes(before, now)}: every image is still seen once an epoch, but the result is no longer that of a run "
        "without the change (other batches, attack starts and BatchNorm statistics; with another global batch also "
        "other steps per epoch, the learning rate's schedule staying with the epochs)"
    )


def model_origin(source: ModelSource) -> str | None:
    """What tells the network that a run starts from: its commit on the Hub, of a folder a digest of its weights' files;
    None for one without weights."""
    folder = Path(source.model_id).expanduser()
    if source.revision is not None or not source.pretrained or not folder.is_dir():
        return source.revision
    files = [find_weights(folder, source.model_id, source.library, allow_pickle=True)]
    if files[0].suffix == ".json":  # an index of several
        files += sorted({folder / name for name in json.loads(files[0].read_text())["weight_map"].values()})
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{digest.hexdigest()[:16]}"


def dataset_origin(splits: Splits) -> str | None:
    """What tells the training images: their commit on the Hub, of a folder its `split_digest` with the class names;
    None for a stream."""
    split = splits.train
    if splits.revision is not None or not isinstance(split.dataset, Dataset):
        return splits.revision
    return split_digest(split, str(splits.class_names).encode())


def check_origins(checkpoints: Path, model: str | None, dataset: str | None) -> None:
    """Raises ConfigError where a run that goes on began with another model or dataset (`model_origin`,
    `dataset_origin`)."""
    for phase in ("standard", "robust"):
        for progress in readable_progress(checkpoints, phase)[-1:]:
            problems = [
                f"cannot resume: the {name} was {old} when the run began and is {new} now. {cure}, or start anew with "
                "another --output-dir."
                for name, old, new, cure in (
                    ("model", progress.model_revision, model, "Give the one of before"),
                    ("dataset", progress.dataset_revision, dataset, "Give the one of before, with --skip-corrupt N for "
                     "images that cannot be read"),
                )
                if old != new and None not in (old, new)
            ]  # fmt: skip
            if problems:
                raise ConfigError(problems)
