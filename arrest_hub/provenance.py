"""What a finished run tells of itself: base model, data, command, time, hardware -> `training_record.json`."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator

from arrest_hub.card_facts import NOT_EXPORTED, card_citations, card_header
from arrest_hub.checkpoint import Progress, list_checkpoints, read_progress
from arrest_hub.config import FIELDS, MODEL_KEYS, FinetuneConfig
from arrest_hub.data import Splits
from arrest_hub.errors import ConfigError, HubError
from arrest_hub.eval_subjects import dataset_name, local_name
from arrest_hub.fields import convert, default_of, flag, flag_with
from arrest_hub.licenses import License, choose_license, license_of_card
from arrest_hub.machine import hardware_name, library_versions
from arrest_hub.model_source import ModelSource, companion_file
from arrest_hub.recipe_files import list_recipes, read_recipe
from arrest_hub.training_record import BaseModel, TrainingData, TrainingRecord


def read_base_model(source: ModelSource) -> BaseModel | None:
    """The network that finetuning starts from, with what its own card states; None for a random initialisation.

    Raises:
        HubError: its card is on the Hub and cannot be fetched.
    """
    if not source.pretrained:
        return None
    card = companion_file(source, "README.md")
    text = card.read_text(encoding="utf-8-sig", errors="replace") if card else ""
    name = source.hub_id or local_name(source.model_id)
    return BaseModel(
        name, source.library, source.architecture, source.hub_id, source.revision,
        license_of_card(card_header(text)), card_citations(text),
    )  # fmt: skip


def base_for_run(config: FinetuneConfig, source: ModelSource) -> tuple[BaseModel | None, str | None]:
    """`read_base_model`, and a sentence to print where its card cannot be had, which stops only who publishes.

    Raises:
        ConfigError: the run is to be published and no licence is known for it. HubError: or its card is out of reach.
    """
    if config.init == "random" and not config.needs_teacher:
        source = dataclasses.replace(source, pretrained=False)  # its weights play no part
    try:
        base, note = read_base_model(source), None
    except HubError as error:
        if config.push_to_hub and config.license is None:
            raise
        name = source.hub_id or local_name(source.model_id)
        base = BaseModel(name, source.library, source.architecture, source.hub_id, source.revision)
        note = f"the base model's card is out of reach, so its licence is not known ({error})"
    if config.push_to_hub:
        given = License(config.license, config.license_name, config.license_link) if config.license else None
        _, problem = choose_license(given, base.license if base else None, base.name if base else None)
        if problem:
            raise ConfigError(f"--push-to-hub {config.push_to_hub}: {problem}")
    return base, note


def exported_config(config: FinetuneConfig, base: BaseModel | None) -> dict[str, Any]:
    """The hyper-parameters as they are published: names instead of paths, the base model at its commit."""
    values = {key: value for key, value in dataclasses.asdict(config).items() if key not in NOT_EXPORTED}
    if base is not None:
        values["model"] = f"{base.id}@{base.revision}" if base.id and base.revision else base.name
    elif Path(config.model).expanduser().is_dir():
        values["model"] = local_name(config.model)
    values["dataset"] = dataset_name(config.dataset)
    if config.recipe is not None:
        values["recipe"] = Path(config.recipe).name
    return values


def training_record(
    config: FinetuneConfig,
    accelerator: Accelerator,
    splits: Splits,
    base: BaseModel | None,
    progress: Progress,
    checkpoints: Path,
    exported_step: int,
) -> TrainingRecord:
    """The facts of a run whose training is finished; ``accelerator`` is the one it trained with."""
    processes, examples = accelerator.num_processes, splits.train.num_examples
    standard = list_checkpoints(checkpoints, "standard")
    clean = read_progress(standard[-1]) if standard else Progress("standard")
    images, seconds = progress.images - clean.images, progress.seconds + clean.seconds
    library = base.library if base else "timm"
    exported = exported_config(config, base)
    return TrainingRecord(
        base=base,
        data=TrainingData(
            exported["dataset"],
            splits.train.name,
            splits.num_classes,
            examples,
            splits.hub_id,
            splits.revision,
            splits.validation.name if splits.validation is not None else None,
            splits.test.drawn_from,
        ),
        command=finetune_command(config, processes, exported["model"], exported["dataset"]),
        steps=progress.step,
        exported_step=exported_step,
        epochs=round(images / examples, 2) if examples else float(progress.epoch),
        seconds=round(seconds, 1),
        processes=processes,
        hardware=hardware_name(accelerator),
        versions=library_versions(library),
        earlier=[_describe_layout(layout, "robust") for layout in progress.earlier]
        + [_describe_layout(layout, "standard") for layout in clean.earlier],
    )


def _describe_layout(layout: dict[str, int], phase: str) -> str:
    """How the batches of a phase's first steps were dealt out, for who reads the record."""
    processes = layout["processes"]
    return (
        f"until step {layout['until']} of the {phase} phase: {processes} process{'es' * (processes != 1)} with "
        f"--batch-size {layout['batch_size']} --grad-accum-steps {layout['grad_accum_steps']}"
    )


def finetune_command(config: FinetuneConfig, processes: int, model: str, dataset: str) -> str:
    """The command line that trains as ``config`` does, quoted for a shell: what differs from its recipe.

    ``model`` and ``dataset`` are what to call them in it. A recipe that is not bundled is written out as flags.
    """
    recipe = config.recipe if config.recipe in list_recipes() else "default"
    values = read_recipe(recipe)
    if config.model != values.get("model"):
        values = {key: value for key, value in values.items() if key not in MODEL_KEYS}
    if values.get("model_args") and not config.model_args:
        recipe, values = "default", read_recipe("default")  # no flag takes a recipe's arguments back
    words = ["arrest-finetune"] if processes == 1 else shlex.split(
        f"accelerate launch --num_processes {processes} -m arrest_hub finetune"
    )  # fmt: skip
    words += ["--recipe", recipe]
    names = {"model": model, "dataset": dataset}
    for key, field in FIELDS.items():
        value = getattr(config, key)
        if key in NOT_EXPORTED or key == "recipe":
            continue
        if value != convert(field, values.get(key, default_of(field))):
            words += _as_flag(key, names.get(key, value))
    return shlex.join(words)


def _as_flag(key: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [flag(key)] if value else [flag(key).replace("--", "--no-", 1)]
    if isinstance(value, dict):
        flow = {name: yaml.safe_dump(item, default_flow_style=True, width=10**6) for name, item in value.items()}
        return [flag(key), *(f"{name}={text.removesuffix('...' + chr(10)).strip()}" for name, text in flow.items())]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return flag_with(key, "none" if value is None else str(value))
