"""Where the values of a configuration come from: default < recipe < flag, or the configuration that was saved."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from arrest_hub.config import CONTRADICTION, FIELDS, MODEL_KEYS, RESUME_MAY_DIFFER, FinetuneConfig
from arrest_hub.errors import ConfigError, did_you_mean
from arrest_hub.fields import convert, flag
from arrest_hub.recipe_files import FOR_DATASET, read_recipe, read_yaml


def unknown_key(name: str, where: str) -> str:
    """One line for a misspelt flag or recipe key, with the nearest real one."""
    if where == "flag":
        return f"unknown flag --{name}.{did_you_mean('--' + name, [flag(key) for key in FIELDS])} See --help."
    return f"unknown key {name!r} in {where}.{did_you_mean(name, FIELDS)}"


def resolve(flags: Mapping[str, Any], recipe: Mapping[str, Any], recipe_name: str | None) -> FinetuneConfig:
    """Default < recipe < flag. A recipe's model keys are dropped when a flag names another model.

    Raises:
        ConfigError: every unknown key and bad value at once.
    """
    problems = [unknown_key(key, "flag") for key in flags if key not in FIELDS]
    problems += [unknown_key(str(key), f"recipe {recipe_name!r}") for key in recipe if key not in FIELDS]
    values = {key: value for key, value in recipe.items() if key in FIELDS}
    if "model" in flags and flags["model"] != recipe.get("model"):
        values = {key: value for key, value in values.items() if key not in MODEL_KEYS}
    values |= {key: value for key, value in flags.items() if key in FIELDS}
    values["recipe"] = recipe_name
    config = FinetuneConfig(**values)
    try:
        config.validate()
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    return config


def unused_flags(config: FinetuneConfig, typed: Iterable[str]) -> list[str]:
    """Those of the flags that were typed which nothing looks at in this configuration, each with the reason."""
    only_arrest = ("rgkd_weight", "rgkd_input", "replay_threshold", "replay_by", "replay_with")
    reasons = {name: f"--method is {config.method}" for name in only_arrest if config.method != "arrest"}
    if config.method != "trades":
        reasons["trades_beta"] = f"--method is {config.method}"
    if not config.rgkd_weight:
        reasons.setdefault("rgkd_input", "--rgkd-weight is 0")
    if config.replay_threshold is None:
        reasons |= {name: "--replay-threshold is none" for name in ("replay_by", "replay_with") if name not in reasons}
    if not config.standard_epochs:
        reasons["standard_lr"] = "there are no --standard-epochs"
    if config.scheduler not in ("cosine", "poly"):
        reasons["min_lr"] = f"--scheduler is {config.scheduler}"
    if config.scheduler == "constant":
        reasons["lr_hold"] = "--scheduler is constant"
    if (config.attack_stop_after or 0) >= config.attack_steps:
        reasons["attack_stop_after"] = f"the attack has {config.attack_steps} steps"
    if config.export_weights == "best" and (not config.eval_every or config.validation_size == 0):
        reasons["export_weights"] = "nothing is validated, so that the last weights are the best known"
    return [f"{flag(name)} ({reason})" for name, reason in reasons.items() if name in set(typed)]


def recipe_config(recipe: str, **values: Any) -> FinetuneConfig:
    """What ``--recipe recipe`` and these flags give: a bundled recipe's name or a YAML file's path, and fields of
    FinetuneConfig that beat it, as in ``recipe_config("imagenet_resnet50", model="timm/resnet18.a1_in1k")``.

    Raises:
        ConfigError: no such recipe, or every unknown key and bad value at once.
    """
    return resolve(values, read_recipe(recipe), recipe)


def load_config(path: Path) -> FinetuneConfig:
    """Read a `config.yaml` that `to_yaml` wrote.

    Raises:
        ConfigError: if it is not one.
    """
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not a configuration.")
    unknown = [unknown_key(str(key), str(path)) for key in values if key not in FIELDS]
    if unknown:
        raise ConfigError(unknown)
    return FinetuneConfig(**values).validate()


def resume_config(saved: FinetuneConfig, flags: Mapping[str, Any]) -> FinetuneConfig:
    """The configuration of a resumed run: the saved one, plus flags that may differ.

    Raises:
        ConfigError: listing every flag whose value differs from the saved run's.
    """
    problems = [unknown_key(key, "flag") for key in flags if key not in FIELDS]
    if flags.get("overwrite"):
        problems.append(CONTRADICTION)
    changes: dict[str, Any] = {}
    for key, value in flags.items():
        if key not in FIELDS:
            continue
        try:
            new, old = convert(FIELDS[key], value), getattr(saved, key)
        except ValueError as error:
            problems.append(str(error))
            continue
        if key in ("model", "dataset") and _same_folder(new, old):
            changes[key] = new
        elif key in RESUME_MAY_DIFFER:
            if new != "auto":  # the batch that the run began with
                changes[key] = new
        elif key == "channels_last" and not old:
            continue  # the run itself switches it off where it would be wrong
        elif new != old:
            problems.append(
                f"{flag(key)} is {new} but the run to resume has {old}: leave the flag out to continue it, "
                "or start a new run with another --output-dir."
            )
    if problems:
        raise ConfigError(problems)
    return dataclasses.replace(saved, **(changes | {"resume": True, "overwrite": False})).validate()


def anchored(config: FinetuneConfig) -> FinetuneConfig:
    """The same with the absolute paths of local folders, so that the run goes on from wherever it is resumed."""
    local = {
        name: os.path.abspath(path)
        for name in ("model", "dataset")
        if (path := os.path.expanduser(getattr(config, name))) and _is_local(name, path)
    }
    return dataclasses.replace(config, **local)


def _is_local(kind: str, path: str) -> bool:
    """Whether this names a folder that is here, and not an architecture or a dataset that goes by the same name."""
    if kind == "dataset":
        return os.path.isdir(path) and path not in FOR_DATASET
    return os.path.isdir(path) and (os.sep in path or os.path.isfile(os.path.join(path, "config.json")))


def _same_folder(new: str, old: str) -> bool:
    """Whether two names are of one folder, or the first is there and the second, a whole path, is not any more."""
    new, old = os.path.expanduser(new), os.path.expanduser(old)
    moved = os.path.isabs(old) and not os.path.exists(old)
    return os.path.isdir(new) and (moved or os.path.abspath(new) == os.path.abspath(old))
