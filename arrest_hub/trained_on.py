"""Which images a model that `arrest-finetune` wrote was trained on, as the files beside it tell."""

from __future__ import annotations

from pathlib import Path

import yaml

from arrest_hub.backbones import Backbone
from arrest_hub.checkpoint import Progress, readable_progress
from arrest_hub.errors import BackboneError, ConfigError
from arrest_hub.model_source import ModelSource, companion_file
from arrest_hub.sources import same_dataset
from arrest_hub.training_record import FILE_NAME as RECORD
from arrest_hub.training_record import read_record


def held_out_seed(
    backbone: Backbone | None, model: str, dataset: str, origin: str, drawn_from: str | None = None
) -> int | None:
    """The seed with which the training of a model held its test images out of the split ``origin`` of ``dataset``; None
    for a model that was not trained on it, or of which no files tell.

    ``model``: what to call it. ``dataset``: an id, or a folder's name. ``drawn_from``: see `ImageSplit`; where it is
    known of both, it decides, whatever the names.

    Raises:
        ConfigError: the training held out other images of it, or none.
        HubError: the file that tells is on the Hub and cannot be fetched. BackboneError: it is damaged.
    """
    if backbone is None:
        return None
    path, record, checkpoints = _training_files(backbone.source)
    if path is None:
        return None
    try:
        training = yaml.safe_load(path.read_text(encoding="utf-8"))
        seed, trained_on = int(training["seed"]), str(training["dataset"])
        train_split, eval_split, streamed = (training.get(key) for key in ("train_split", "eval_split", "streaming"))
        if record is not None:
            recorded = read_record(record).data.drawn_from
        else:  # of a run that is not finished
            told = [known.drawn_from for known in _progress(checkpoints) if known.drawn_from is not None]
            recorded = told[-1] if told else None
    except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise BackboneError(f"{path} is damaged: it does not tell what was trained on ({error}).") from error
    if None not in (recorded, drawn_from) and recorded == drawn_from:
        return seed
    if not same_dataset(_name(trained_on), dataset) or train_split not in (None, origin):
        return None
    if None not in (recorded, drawn_from):
        raise ConfigError(
            f"{model} was trained on {origin!r} of {dataset} when it held other images or labels: a tenth of it drawn "
            "now may have been trained on. Give --eval-split, or another --dataset."
        )
    if eval_split is not None:
        raise ConfigError(
            f"{model} was trained on all of {origin!r} of {dataset}, of which a tenth would be drawn: give "
            f"--eval-split {eval_split}, as in its training."
        )
    if streamed:
        raise ConfigError(
            f"{model} was trained on {dataset} as a stream, of which the first images were held out: a tenth drawn now "
            "would have been trained on. Give --eval-split, or another --dataset."
        )
    return seed


def _name(dataset: str) -> str:
    """An id as it is, of a folder its name alone, whether or not the folder is still there."""
    path = Path(dataset).expanduser()
    return path.resolve().name if path.is_dir() or path.is_absolute() else dataset


def _progress(checkpoints: Path | None) -> list[Progress]:
    """What the checkpoints of a run say of themselves, the newest last."""
    if checkpoints is None:
        return []
    return [found for phase in ("standard", "robust") for found in readable_progress(checkpoints, phase)]


def _training_files(source: ModelSource) -> tuple[Path | None, Path | None, Path | None]:
    """The configuration of the run that a model is of, and its record: beside an export, else of the run in whose
    folder a teacher, a checkpoint or an export that was not finished lies; then that run's `checkpoints/` too."""
    record = companion_file(source, RECORD)
    if record is not None:
        return companion_file(source, "training_config.yaml"), record, None
    if source.hub_id is None:
        for run in Path(source.model_id).expanduser().resolve().parents[:2]:
            if (run / "config.yaml").is_file() and (run / "checkpoints").is_dir():
                record = run / "export" / RECORD
                return run / "config.yaml", record if record.is_file() else None, run / "checkpoints"
    return None, None, None
