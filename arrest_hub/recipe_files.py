"""The bundled recipes: find one by name, path or dataset, and read it. A recipe holds what differs from defaults."""

from __future__ import annotations

from importlib import resources
from importlib.resources.abc import Traversable
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


class _OnceLoader(yaml.SafeLoader):
    """A safe loader for which a key that is given twice is an error, and not the last one's value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Traversable) -> Any:
    """What a YAML file of a configuration holds; ``path`` is a Path or a file of the package.

    Raises:
        ConfigError: it cannot be read, is not UTF-8, is not YAML, or has a key twice.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _OnceLoader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error.reason}): save it as UTF-8.") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error


def read_recipe(name: str) -> dict[str, Any]:
    """Read a bundled recipe by name, or any recipe by the path of its YAML file.

    Raises:
        ConfigError: no such recipe (names the nearest), or not a YAML mapping.
    """
    if name in list_recipes():
        values = read_yaml(resources.files("arrest_hub.recipes").joinpath(f"{name}.yaml"))
    elif name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"--recipe {name!r}: there is no such file.")
        values = read_yaml(path)
    else:
        raise ConfigError(
            f"--recipe {name!r} is not a bundled recipe.{did_you_mean(name, list_recipes())} "
            f"Give one of {', '.join(list_recipes())}, or the path of a .yaml file."
        )
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"recipe {name!r} must be a mapping of keys to values, not {type(values).__name__}.")
    return values
