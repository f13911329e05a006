import dataclasses
import json
import shlex

import pytest
import yaml
from tiny import write_images, write_model

from arrest_hub.card_facts import NOT_EXPORTED
from arrest_hub.cli import parse_finetune
from arrest_hub.config import FinetuneConfig
from arrest_hub.config_sources import resolve
from arrest_hub.errors import ConfigError
from arrest_hub.licenses import License
from arrest_hub.model_source import ModelSource, locate
from arrest_hub.provenance import _as_flag, base_for_run, exported_config, finetune_command, read_base_model
from arrest_hub.recipe_files import list_recipes, read_recipe
from arrest_hub.training_record import BaseModel, TrainingData, TrainingRecord, read_record

COMMIT = "a" * 40
HUB_BASE = BaseModel("org/base", "timm", "resnet18", "org/base", COMMIT)
CARD = "---\nlicense: {}\n---\n# A model\n\n```bibtex\n@misc{{base, title = {{The {{B}}ase}}}}\n```\n"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "my-model")


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "my images", count=3)


def recipe_config(recipe="default", **flags):
    """A run as the command line starts it."""
    values = read_recipe(recipe)
    if not values.get("model"):
        flags = {"model": "org/model", "dataset": "org/data"} | flags
    return resolve(flags, values, recipe)


def command(config, processes=1):
    return finetune_command(config, processes, config.model, config.dataset)


def parsed(text):
    words = shlex.split(text)
    return parse_finetune(words[words.index("finetune") + 1 :] if words[0] == "accelerate" else words[1:])[0]


def essence(config):
    """What makes a run what it is, without what no command tells."""
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in NOT_EXPORTED}


@pytest.mark.parametrize("recipe", list_recipes())
def test_the_command_of_a_bundled_recipe_is_its_name(recipe):
    config = recipe_config(recipe)
    named = " --model org/model --dataset org/data" if recipe == "default" else ""
    assert command(config) == f"arrest-finetune --recipe {recipe}{named}"
    assert essence(parsed(command(config))) == essence(config)


@pytest.mark.parametrize("recipe", ["default", "quickstart", "imagenet_vit_small"])
@pytest.mark.parametrize(
    "changes",
    [
        {"streaming": True}, {"allow_pickle": True, "streaming": True}, {"replay_threshold": None},
        {"clip_grad": None, "ema_decay": None}, {"limit_train": 100, "image_size": 16}, {"eps": "16/255"},
        {"norm": "l2", "eps": "0.5", "attack_step_size": "1/10"}, {"lr": 1e-05}, {"lr": 123456.75, "min_lr": 1e-12},
        {"validation_size": 500.0}, {"validation_size": 0.1}, {"hflip": 0.0}, {"seed": 7}, {"method": "trades"},
        {"image_column": "the image", "label_column": 'a "label" of it\'s own'}, {"train_split": "train[:10%]"},
        {"image_column": "-img", "label_column": "--label"}, {"eval_split": "$HOME `x` ; rm"}, {"train_split": "a=b"},
        {"model": "resnet18_cifar", "model_args": {"channels": [4, 8], "act_layer": "a b", "norm": None, "x": "1"}},
        {"model": "resnet18_cifar", "model_args": {"a": 0.1, "b": {"c": [True, "no", None]}, "d": "x...", "e": ""}},
        {"model": "resnet18_cifar", "model_args": {"a": 1e-05, "b": "a: b", "c": "it's", "d": "two\nlines"}},
        {"dataset": "org/data:config name"}, {"model": "other/model@v1"}, {"push_to_hub": "me/x", "private": True},
    ],
    ids=str,
)  # fmt: skip
def test_the_command_is_parsed_back(recipe, changes):
    config = recipe_config(recipe, **changes)
    assert essence(parsed(command(config))) == essence(config)


def test_every_switch_has_a_flag_that_turns_it_on_and_one_that_turns_it_off():
    switches = [f.name for f in dataclasses.fields(FinetuneConfig) if f.metadata["kind"] == "bool"]
    for name in set(switches) - set(NOT_EXPORTED):
        for value in (True, False):
            words = ["--recipe", "quickstart", *_as_flag(name, value)]
            assert getattr(parse_finetune(words)[0], name) is value
            assert len(words) == 3
            assert ("--no-" in words[-1]) is not value


def test_the_command_tells_only_what_differs_from_the_recipe():
    config = recipe_config("quickstart", lr="0.3")
    assert command(config) == "arrest-finetune --recipe quickstart --lr 0.3"


def test_arguments_that_a_recipe_gives_can_be_taken_back():
    config = dataclasses.replace(recipe_config("quickstart"), model_args={})
    again = parsed(command(config))
    assert essence(again) | {"recipe": None} == essence(config) | {"recipe": None}


def test_another_model_does_not_take_the_recipes_arguments():
    config = recipe_config("quickstart", model="timm/resnet18.a1_in1k")
    assert (config.model_args, config.standard_epochs) == ({}, 0)
    text = command(config)
    assert "--model timm/resnet18.a1_in1k" in text
    assert "standard" not in text
    assert essence(parsed(text)) == essence(config)


def test_a_recipe_of_ones_own_is_written_out(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model: org/model\ndataset: org/data\nlr: 0.3\nstreaming: true\nreplay_threshold: null\n")
    config, _ = parse_finetune(["--recipe", str(path), "--epochs", "3"])
    text = command(config)
    assert str(tmp_path) not in text
    assert text.startswith("arrest-finetune --recipe default ")
    assert essence(parsed(text)) == essence(config) | {"recipe": "default"}


def test_a_configuration_without_a_recipe_is_written_out():
    config = FinetuneConfig(model="org/model", dataset="org/data", epochs=3).validate()
    assert command(config) == "arrest-finetune --recipe default --model org/model --dataset org/data --epochs 3"
    assert essence(parsed(command(config))) == essence(config) | {"recipe": "default"}


def test_several_processes_are_launched():
    config = recipe_config("quickstart", streaming=True)
    text = command(config, processes=2)
    assert text.startswith("accelerate launch --num_processes 2 -m arrest_hub finetune --recipe quickstart")
    assert essence(parsed(text)) == essence(config)


def test_the_command_calls_model_and_data_by_the_names_it_is_given(model_folder, data_folder):
    config = FinetuneConfig(model=str(model_folder), dataset=str(data_folder), recipe="default").validate()
    text = finetune_command(config, 1, "my-model", "my images")
    assert text == "arrest-finetune --recipe default --model my-model --dataset 'my images'"


def test_the_exported_configuration_has_no_path_in_it(tmp_path, model_folder, data_folder):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("lr: 0.3\n")
    words = ["--recipe", str(recipe), "--model", str(model_folder), "--dataset", str(data_folder)]
    config, _ = parse_finetune([*words, "--output-dir", str(tmp_path / "run")])
    base = read_base_model(locate(config.model).source)
    values = exported_config(config, base)
    text = yaml.safe_dump(values)
    assert not [folder for folder in (tmp_path, model_folder.parent, data_folder.parent) if str(folder) in text]
    assert (values["model"], values["dataset"], values["recipe"]) == ("my-model", "my images", "mine.yaml")
    assert values["lr"] == 0.3
    assert not set(NOT_EXPORTED) & set(values)
    assert set(values) == {f.name for f in dataclasses.fields(config)} - set(NOT_EXPORTED)


def test_the_exported_configuration_names_a_model_on_the_hub_at_its_commit():
    config = recipe_config(model="org/base@main", dataset="org/data")
    values = exported_config(config, HUB_BASE)
    assert (values["model"], values["dataset"], values["recipe"]) == (f"org/base@{COMMIT}", "org/data", "default")
    assert exported_config(recipe_config("quickstart"), None)["model"] == "resnet18_cifar"
    assert exported_config(FinetuneConfig(model="m", dataset="d"), None)["recipe"] is None


def write_card(folder, license, text=CARD):
    (folder / "README.md").write_text(text.format(license), encoding="utf-8")


@pytest.fixture
def local(tmp_path):
    """The source of a local model without a card."""
    (tmp_path / "base").mkdir()
    return ModelSource(str(tmp_path / "base"), "timm", "resnet18", None, True, None)


def test_a_base_model_with_a_card(local, tmp_path):
    write_card(tmp_path / "base", "mit")
    citation = "@misc{base, title = {The {B}ase}}"
    assert read_base_model(local) == BaseModel("base", "timm", "resnet18", None, None, License("mit"), [citation])


def test_a_base_model_without_a_card_or_with_one_that_says_nothing(local, tmp_path):
    expected = BaseModel("base", "timm", "resnet18", None, None, None, [])
    assert read_base_model(local) == expected
    for content in (b"", b"# A model\n", b"---\nlicense: [\n---\n", b"---\nlicense: unknown\n---\n", b"\xff\xfe\x00"):
        (tmp_path / "base" / "README.md").write_bytes(content)
        assert read_base_model(local) == expected


def test_an_export_is_called_by_its_run(tmp_path):
    source = ModelSource(str(tmp_path / "mine" / "export"), "timm", "resnet18", None, True, None)
    assert read_base_model(source).name == "mine"


def test_a_random_initialisation_has_no_base():
    assert read_base_model(locate("resnet18").source) is None


@pytest.mark.parametrize(
    ("license", "part"),
    [(None, "not known"), ("cc-by-nc-4.0", "is under cc-by-nc-4.0"), ("unknown", "not known"), ("mine", "under mine")],
)
def test_a_run_to_be_published_needs_a_licence(local, tmp_path, license, part):
    if license:
        write_card(tmp_path / "base", license)
    config = FinetuneConfig(model=local.model_id, dataset="digits", push_to_hub="me/x")
    with pytest.raises(ConfigError, match="--license") as caught:
        base_for_run(config, local)
    assert part in str(caught.value)
    assert "--push-to-hub me/x" in str(caught.value)
    base, note = base_for_run(dataclasses.replace(config, push_to_hub=None), local)
    assert (base.name, note) == ("base", None), "who does not publish is not asked"
    base, note = base_for_run(dataclasses.replace(config, license="mit"), local)
    assert (base, note) == (read_base_model(local), None)


def test_a_permissive_base_needs_no_licence_to_be_given(local, tmp_path):
    write_card(tmp_path / "base", "apache-2.0")
    base, note = base_for_run(FinetuneConfig(model="m", dataset="d", push_to_hub="me/x"), local)
    assert (base.license, note) == (License("apache-2.0"), None)


def test_a_network_without_a_base_is_asked_for_its_licence():
    config = FinetuneConfig(model="resnet18", dataset="digits", push_to_hub="me/x")
    source = locate("resnet18").source
    with pytest.raises(ConfigError, match=r"no base model.*--license"):
        base_for_run(config, source)
    assert base_for_run(dataclasses.replace(config, license="mit"), source) == (None, None)


def test_weights_that_play_no_part_are_no_base_model(local):
    random_at = FinetuneConfig(model=local.model_id, dataset="digits", init="random", method="at")
    assert base_for_run(random_at, local) == (None, None)
    assert local.model_id not in exported_config(random_at, None)["model"], "a path is nobody's business all the same"
    taught = dataclasses.replace(random_at, method="arrest")
    assert base_for_run(taught, local)[0].name == "base"


RECORDS = [
    TrainingRecord(
        BaseModel("org/base", "timm", "resnet18", "org/base", COMMIT, License("other", "é", "l"), ["@misc{a,\n}"]),
        TrainingData("org/data:x", "train", 3, 500, "org/data", COMMIT), "arrest-finetune --recipe 'a b'", 20, 10, 2.5,
        61.1, 2, "2 x H100", {"torch": "2.11"},
    ),
    TrainingRecord(
        BaseModel("base", "transformers", "ViT"), TrainingData("d", "train", 3), "c", 1, 1, 1.0, 0.0, 1, "", {}
    ),
    TrainingRecord(None, TrainingData("d", "train", 3, 5), "c", 1, 1, 1.0, 0.0, 1, "1 x CPU", {}),
]  # fmt: skip


@pytest.mark.parametrize("record", RECORDS, ids=["hub", "local", "random"])
def test_a_training_record_survives_its_file(record, tmp_path):
    path = tmp_path / "training_record.json"
    record.write(path)
    assert read_record(path) == record
    assert json.loads(path.read_text(encoding="utf-8"))["format"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_record_of_a_version_that_did_not_tell_the_validation_split(tmp_path):
    path = tmp_path / "training_record.json"
    RECORDS[0].write(path)
    data = json.loads(path.read_text(encoding="utf-8"))
    del data["data"]["validation"]
    path.write_text(json.dumps(data), encoding="utf-8")
    assert read_record(path) == RECORDS[0]


def change(key, value):
    return lambda data: data | {key: value}


def without(key):
    return lambda data: {name: value for name, value in data.items() if name != key}


@pytest.mark.parametrize(
    "damage",
    [
        change("format", 2), without("format"), without("base"), without("data"), without("command"), change("more", 1),
        change("base", "org/base"), change("base", {"name": "x"}), change("base", {}), change("data", None),
        change("data", {"name": "x"}), change("data", []), lambda data: [data], lambda data: None,
        lambda data: data | {"base": data["base"] | {"license": "mit"}},
        lambda data: data | {"base": data["base"] | {"more": 1}},
    ],
)  # fmt: skip
def test_a_damaged_record_is_a_value_error(damage, tmp_path):
    path = tmp_path / "training_record.json"
    RECORDS[0].write(path)
    path.write_text(json.dumps(damage(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")
    with pytest.raises(ValueError, match=r"training_record\.json"):
        read_record(path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff"])
def test_a_record_that_is_no_json_is_a_value_error(content, tmp_path):
    path = tmp_path / "training_record.json"
    path.write_bytes(content)
    with pytest.raises(ValueError):
        read_record(path)
