import re
import shlex
from pathlib import Path

import pytest
import yaml

from arrest_hub.cli import parse_finetune
from arrest_hub.config import FinetuneConfig
from arrest_hub.config_sources import load_config, recipe_config, resolve
from arrest_hub.errors import ConfigError
from arrest_hub.recipe_files import FOR_DATASET, list_recipes, read_recipe, recipe_for_dataset
from arrest_hub.sources import ALIASES

FOLDER = Path(__file__).parent.parent / "recipes"


def test_the_promised_recipes_are_there():
    assert {
        "quickstart", "cifar10_resnet18", "cifar10_wrn34_10", "cifar100_wrn34_10", "imagenet_resnet50",
        "imagenet_vit_small", "imagenet_convnext_tiny", "default",
    } <= set(list_recipes())  # fmt: skip
    assert set(FOR_DATASET.values()) <= set(list_recipes())
    assert set(FOR_DATASET) == set(ALIASES), "the datasets that go by a short name"


@pytest.mark.parametrize("name", list_recipes())
def test_recipe_is_valid_and_holds_only_what_differs(name):
    recipe = read_recipe(name)
    flags = {} if name != "default" else {"model": "m", "dataset": "d"}
    config = resolve(flags, recipe, name)
    defaults = FinetuneConfig()
    same = [key for key, value in recipe.items() if value == getattr(defaults, key)]
    assert not same, f"{name} repeats defaults: {same}"
    assert config.recipe == name


@pytest.mark.parametrize("name", list_recipes())
def test_recipe_opens_with_commands_that_parse(name):
    text = (FOLDER / f"{name}.yaml").read_text()
    header = [line[1:].strip() for line in text.splitlines() if line.startswith("#")]
    commands = [line for line in header if re.match(r"(arrest-finetune|accelerate launch)\b", line)]
    assert commands
    for command in commands:
        words = shlex.split(command)
        argv = words[1:] if words[0] == "arrest-finetune" else words[words.index("finetune") + 1 :]
        assert parse_finetune(argv)[0].recipe is not None


def test_a_misspelt_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match="quickstart"):
        read_recipe("quikstart")


def test_a_recipe_by_path(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"lr": 0.3}))
    assert read_recipe(str(path)) == {"lr": 0.3}
    path.write_text("lr: [")
    (tmp_path / "twice.yaml").write_text("epochs: 1\nmodel: m\nepochs: 5\n")
    with pytest.raises(ConfigError, match=r"twice.yaml is not valid YAML: 'epochs' is given twice.*line 3"):
        read_recipe(str(tmp_path / "twice.yaml"))
    (tmp_path / "nested.yaml").write_text("model_args: {a: 1, b: 2, a: 3}\n")
    with pytest.raises(ConfigError, match="'a' is given twice"):
        read_recipe(str(tmp_path / "nested.yaml"))
    (tmp_path / "merged.yaml").write_text("model_args: &x {a: 1}\nother: {<<: *x, a: 2}\n")
    assert read_recipe(str(tmp_path / "merged.yaml")) == {"model_args": {"a": 1}, "other": {"a": 2}}
    for name, content in (("latin", "model: m # Gr\xf6\xdfe\n".encode("latin-1")), ("wide", "a: 1\n".encode("utf-16"))):
        (tmp_path / f"{name}.yaml").write_bytes(content)
        for read in (lambda path: read_recipe(str(path)), load_config):
            with pytest.raises(ConfigError, match=rf"{name}.yaml is not UTF-8 text.*save it as UTF-8"):
                read(tmp_path / f"{name}.yaml")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_recipe(str(path))
    path.write_text("- lr")
    with pytest.raises(ConfigError, match="mapping"):
        read_recipe(str(path))
    with pytest.raises(ConfigError, match="no such file"):
        read_recipe(str(tmp_path / "other.yaml"))


def test_dataset_recipes():
    assert recipe_for_dataset("digits") == "quickstart"
    assert recipe_for_dataset("./images") == "default"
    assert recipe_for_dataset(None) == "default"


def test_a_recipes_values_from_python():
    config = recipe_config("cifar10_resnet18", model="./mine", lr=0.5)
    assert (config.rgkd_weight, config.lr, config.standard_epochs, config.model) == (100, 0.5, 0, "./mine")
    with pytest.raises(ConfigError, match="rgkd_weigth"):
        recipe_config("cifar10_resnet18", rgkd_weigth=1)
    with pytest.raises(ConfigError, match="cifar10_resnet18"):
        recipe_config("cifar10_resnet81")
