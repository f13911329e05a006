"""The bundled recipes: find one by name, path or dataset, and read it. A recipe holds what differs from defaults."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from arrest_hub.errors import ConfigError, did_you_mean

# which recipe serves a dataset when --recipe is not given
FOR_DATASET = {
    "digits": "quickstart",
    "cifar10": "cifar10_resnet18",
    "cifar100": "cifar100_wrn34_10",
    "imagenet": "imagenet_resnet50",
}


def list_recipes() -> list[str]:
    """Names of the bundled recipes, sorted."""
    files = resources.files("arrest_hub.recipes").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def recipe_for_dataset(dataset: str | None) -> str:
    """The bundled recipe for a dataset alias, else ``"default"``."""
    return FOR_DATASET.get(dataset or "", "default")


def read_recipe(name: str) -> dict[str, Any]:
    """Read a bundled recipe by name, or any recipe by the path of its YAML file.

    Raises:
        ConfigError: no such recipe (names the nearest), or not a YAML mapping.
    """
    if name in list_recipes():
        text = resources.files("arrest_hub.recipes").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    elif name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"--recipe {name!r}: there is no such file.")
        text = path.read_text(encoding="utf-8")
    else:
        raise ConfigError(
            f"--recipe {name!r} is not a bundled recipe.{did_you_mean(name, list_recipes())} "
            f"Give one of {', '.join(list_recipes())}, or the path of a .yaml file."
        )
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {name!r} is not valid YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"recipe {name!r} must be a mapping of keys to values, not {type(values).__name__}.")
    return values
