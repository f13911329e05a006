import dataclasses
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import yaml

from arrest_hub.config import FIELDS, FinetuneConfig
from arrest_hub.config_sources import anchored, load_config, resolve, resume_config, unused_flags
from arrest_hub.errors import ConfigError
from arrest_hub.eval_config import EvalConfig, fraction_name
from arrest_hub.fields import convert, parse_fraction

GOOD = {"model": "m", "dataset": "d"}


def problems(flags, recipe=None):
    with pytest.raises(ConfigError) as caught:
        resolve(flags, recipe or {}, "r")
    return caught.value.problems


def test_flag_beats_recipe_beats_default():
    config = resolve(GOOD | {"lr": "0.5"}, {"lr": 0.1, "epochs": 3}, "r")
    assert (config.lr, config.epochs, config.batch_size) == (0.5, 3, FinetuneConfig().batch_size)


def test_eps_is_read_exactly():
    assert parse_fraction("8/255") == Fraction(8, 255)
    assert parse_fraction("0.1") == Fraction(1, 10)
    assert resolve(GOOD | {"eps": "8 / 255"}, {}, None).eps == "8/255"
    assert resolve(GOOD | {"eps": "8/255"}, {}, None).eps_value == 8 / 255


@pytest.mark.parametrize("eps", ["eight", "8/0", "-8/255", "8//255", "", "nan", "1e", "8/255/2", "__import__('os')"])
def test_eps_that_is_no_fraction(eps):
    (problem,) = problems(GOOD | {"eps": eps})
    assert "--eps" in problem
    assert "8/255" in problem


def test_eps_in_pixel_levels_gets_a_hint():
    (problem,) = problems(GOOD | {"eps": "8"})
    assert "8/255" in problem
    assert resolve(GOOD | {"eps": "3", "norm": "l2"}, {}, None).eps_value == 3


def test_all_problems_come_together():
    found = problems({"epochs": "-1", "epsx": "8/255", "lr": "fast", "norm": "l3"}, {"batchsize": 12})
    text = "\n".join(found)
    assert len(found) == 7
    for part in ("--epochs", "'--eps'", "'batch_size'", "--lr", "--norm", "--model is missing", "--dataset is missing"):
        assert part in text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epochs", "1.5"), ("epochs", True), ("epochs", 2.0), ("limit_train", "-3"), ("batch_size", "0"), ("lr", "0"),
        ("lr", "inf"), ("lr", "nan"), ("streaming", "yes"), ("streaming", 1), ("hflip", "1.5"),
        ("mixed_precision", "fp8"), ("model_args", "x"), ("seed", "-1"), ("replay_threshold", "2"), ("ema_decay", "1"),
        ("epochs", None), ("skip_corrupt", 1_000_000_000),
    ],
)  # fmt: skip
def test_bad_values_name_the_flag_and_the_value(key, value):
    (problem,) = problems(GOOD | {key: value})
    assert "--" + key.replace("_", "-") in problem
    if value is not None:
        assert str(value) in problem


def test_none_switches_optional_parts_off():
    assert resolve(GOOD | {"replay_threshold": "none"}, {}, None).replay_threshold is None
    assert resolve(GOOD, {"replay_threshold": None}, None).replay_threshold is None


def test_yaml_numbers_written_with_an_exponent():
    # YAML 1.1 reads 1e-4 as text
    assert resolve(GOOD, {"lr": "1e-4"}, "r").lr == 1e-4


def test_no_in_yaml_is_the_word():
    assert resolve(GOOD, yaml.safe_load("mixed_precision: no"), "r").mixed_precision == "no"
    (problem,) = problems(GOOD, yaml.safe_load("mixed_precision: yes"))
    assert "--mixed-precision True is not" in problem


def test_a_recipes_model_keys_belong_to_its_model():
    recipe = {
        "model": "resnet18_cifar",
        "model_args": {"channels": [4]},
        "standard_epochs": 9,
        "image_size": 8,
        "lr": 0.3,
    }
    config = resolve({"model": "./mine", "dataset": "d"}, recipe, "r")
    assert (config.model_args, config.standard_epochs, config.image_size, config.lr) == ({}, 0, None, 0.3)
    assert resolve({"dataset": "d"}, recipe, "r").standard_epochs == 9


def test_config_survives_yaml(tmp_path):
    config = resolve(GOOD | {"eps": "4/255", "replay_threshold": "none", "model_args": {"channels": [4, 8]}}, {}, "r")
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "config.yaml") == config


def test_default_step_is_madrys():
    config = resolve(GOOD | {"eps": "8/255", "attack_steps": "10"}, {}, None)
    assert config.step_size_value == pytest.approx(2 / 255)


def test_cheaper_attacks_are_checked():
    growing, by_label = problems(GOOD | {"attack_steps_start": 11, "attack_stop_after": 1, "method": "trades"})
    assert "--attack-steps-start 11 is more than the 10 --attack-steps" in growing
    assert "--attack-stop-after goes by the label" in by_label
    assert [resolve(GOOD, {}, None).attack_steps_at(done) for done in (0, 0.5)] == [10, 10]
    grows = resolve(GOOD | {"attack_steps_start": 1}, {}, None)
    assert [grows.attack_steps_at(done) for done in (0, 0.5, 1)] == [1, 6, 10]


def test_training_may_have_an_eps_of_its_own():
    config = resolve(GOOD | {"eps": "8/255", "eps_train": "10/255"}, {}, None)
    assert (config.eps_value, config.eps_train_value) == (8 / 255, 10 / 255)
    assert config.step_size_value == pytest.approx(2.5 / 255)
    assert config.step_size_for(config.eps_value) == pytest.approx(2 / 255), "validation attacks within eps"
    assert resolve(GOOD | {"eps": "4/255"}, {}, None).eps_train_value == 4 / 255
    (problem,) = problems(GOOD | {"eps_train": "10"})
    assert "--eps-train 10 is out of range" in problem
    (problem,) = problems(GOOD | {"eps_train": "2/255", "attack_step_size": "5/255"})
    assert "--attack-step-size 5/255 is more than the whole ball" in problem


def test_ingredients_are_checked():
    head, late = problems(GOOD | {"freeze_head": True, "init": "random", "ema_start_epoch": 2})
    assert "--freeze-head with --init random" in head
    assert "add --ema-decay" in late
    (problem,) = problems(GOOD | {"ema_decay": 0.9, "ema_start_epoch": 5, "epochs": 5})
    assert "--ema-start-epoch 5 is not before the end" in problem
    (problem,) = problems(GOOD | {"eps_spread": 0.5, "method": "trades"})
    assert "--eps-spread 0.5 goes by the label" in problem
    for key, value in {
        "eps_spread": 1.5,
        "awp_gamma": -1,
        "label_smoothing": 2,
        "lr_hold": 0,
        "augment": "mixup",
    }.items():
        assert len(problems(GOOD | {key: value})) == 1


def test_a_learning_rate_that_could_only_rise_is_refused():
    (problem,) = problems(GOOD | {"min_lr": 0.1, "lr": 0.01})
    assert "--min-lr 0.1 is above the peak of 0.01" in problem
    (problem,) = problems(GOOD | {"min_lr": 0.005, "lr": 0.01, "standard_epochs": 2, "standard_lr": 0.001})
    assert "above the peak of 0.001" in problem
    assert resolve(GOOD | {"min_lr": 0.1, "lr": 0.01, "scheduler": "constant"}, {}, None).min_lr == 0.1
    (problem,) = problems(GOOD | {"warmup_epochs": 2, "epochs": 2})
    assert "--warmup-epochs 2 is all of a training of 2 epochs" in problem
    (problem,) = problems(GOOD | {"warmup_epochs": 2, "epochs": 9, "standard_epochs": 1})
    assert "a training of 1 epochs" in problem
    assert resolve(GOOD | {"warmup_epochs": 0.5, "epochs": 1}, {}, None).warmup_epochs == 0.5
    assert resolve(GOOD | {"min_lr": 1e-4, "standard_lr": 1e-5}, {}, None), "of a clean phase that there is not"


@pytest.mark.parametrize(
    ("flags", "unused"),
    [
        ({"method": "trades", "rgkd_weight": 3, "replay_threshold": 0.1}, {"--rgkd-weight", "--replay-threshold"}),
        ({"method": "at", "trades_beta": 3, "replay_by": "batch"}, {"--trades-beta", "--replay-by"}),
        ({"rgkd_weight": 0, "rgkd_input": "clean"}, {"--rgkd-input"}),
        ({"replay_threshold": None, "replay_with": "clean"}, {"--replay-with"}),
        ({"standard_lr": 0.5, "scheduler": "constant", "min_lr": 0.001}, {"--standard-lr", "--min-lr"}),
        ({"attack_steps": 2, "attack_stop_after": 5}, {"--attack-stop-after"}),
        ({"eval_every": 0, "export_weights": "best"}, {"--export-weights"}),
        ({"method": "trades", "trades_beta": 3, "epochs": 2}, set()),
        ({"rgkd_weight": 3, "replay_with": "clean", "standard_lr": 0.5, "standard_epochs": 2}, set()),
    ],
)
def test_flags_that_nothing_looks_at_are_named(flags, unused):
    named = unused_flags(resolve(GOOD | flags, {}, None), [*GOOD, *flags])
    assert {text.split(" ")[0] for text in named} == unused
    assert all("(" in text for text in named)


def test_names_of_folders_keep_letters():
    assert resolve(GOOD | {"model": "模型"}, {}, None).output_dir == "runs/模型-d-arrest"
    assert resolve(GOOD | {"model": "org/a b@main"}, {}, None).output_dir == "runs/a_b-d-arrest"
    long = resolve(GOOD | {"model": "模" * 80, "dataset": "型" * 80}, {}, None).output_dir
    assert len(long.removeprefix("runs/").encode()) < 255
    assert resolve(GOOD | {"model": "//", "dataset": "!!"}, {}, None).output_dir.endswith("x-arrest")


def test_every_ingredient_is_off_by_default():
    config = resolve(GOOD, {}, None)
    off = {"ema_decay": None, "ema_start_epoch": 0, "awp_gamma": 0, "eps_spread": 0, "eps_train": None, "lr_hold": None,
           "freeze_head": False, "label_smoothing": 0, "augment": "none", "random_erasing": 0,
           "rgkd_input": "adversarial", "replay_by": "sample", "replay_with": "noise"}  # fmt: skip
    assert {key: getattr(config, key) for key in off} == off


def test_resume_lists_what_differs():
    saved = resolve(GOOD, {}, "default")
    same = resume_config(saved, {"lr": str(saved.lr), "resume": True, "log_every": "3"})
    assert same.log_every == 3
    assert same.resume
    with pytest.raises(ConfigError) as caught:
        resume_config(saved, {"lr": "0.3", "eps": "4/255", "model": "m"})
    assert [p.split()[0] for p in caught.value.problems] == ["--lr", "--eps"]


def test_every_field_has_help_and_a_valid_default():
    for field in dataclasses.fields(FinetuneConfig):
        assert field.metadata["help"]
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        assert convert(field, default) == default
    assert set(FIELDS) == {field.name for field in dataclasses.fields(FinetuneConfig)}


def test_a_radius_as_python_computes_it_is_the_fraction():
    for value, expected in ((8 / 255, "8/255"), (0.5, "0.5"), (0.2, "0.2"), (Fraction(4, 255), "4/255"), (1.0, "1.0")):
        assert FinetuneConfig(model="m", dataset="digits", norm="l2", eps=value).validate().eps == expected
    with pytest.raises(ConfigError, match=r"Did you mean 2/255\?"):
        FinetuneConfig(model="m", dataset="digits", eps="2/1").validate()


def test_paths_are_names_too(tmp_path):
    config = FinetuneConfig(model=tmp_path / "m", dataset="digits", output_dir=tmp_path / "run").validate()
    assert (config.model, config.output_dir) == (str(tmp_path / "m"), str(tmp_path / "run"))


def test_only_local_folders_are_anchored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("cifar10", "mine", "org/name", "resnet18"):
        (tmp_path / name).mkdir(parents=True)

    def names(**changes):
        config = anchored(FinetuneConfig(**({"model": "m/x", "dataset": "digits"} | changes)))
        return config.model, config.dataset

    assert names(dataset="cifar10") == ("m/x", "cifar10"), "what goes by that name is not the folder"
    assert names(dataset="mine", model="org/name") == (str(tmp_path / "org/name"), str(tmp_path / "mine"))
    assert names(model="resnet18", dataset="org/other") == ("resnet18", "org/other")
    (tmp_path / "resnet18" / "config.json").write_text("{}")
    assert names(model="resnet18", dataset=".") == (str(tmp_path / "resnet18"), str(tmp_path))


def test_default_folders_are_named_after_folders_whatever_their_names_hold(tmp_path, monkeypatch):
    (tmp_path / "me@corp" / "lr@0.1" / "export").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "me@corp")

    def run(model):
        return FinetuneConfig(model=model, dataset="d", method="at").validate().output_dir

    def evaluation(model):
        return EvalConfig(model=model, dataset="d", eps="8/255").validate().output_dir

    assert run("org/name@main") == "runs/name-d-at"
    assert evaluation("org/name@main") == "evals/name-d-linf-8_255"
    assert run(str(tmp_path / "me@corp" / "lr@0.1")) == run("lr@0.1") == "runs/lr_0.1-d-at"
    assert evaluation("lr@0.1/export") == evaluation("lr@0.1") == "evals/lr_0.1-d-linf-8_255"
    assert run(".") == "runs/me_corp-d-at"
    assert evaluation(".") == "evals/me_corp-d-linf-8_255"
    assert len(Path(evaluation("n" * 240)).name) < 120, "file systems take 255 characters"
    assert len(Path(run("n" * 240)).name) < 120


@pytest.mark.parametrize(
    ("value", "name"), [("8/255", "8/255"), ("128/255", "128/255"), ("1/2", "1/2"), ("1", "1"), ("2", "2"), ("0", "0")]
)
def test_radii_are_written_as_people_do(value, name):
    assert fraction_name(Fraction(value)) == name


def test_numbers_of_numpy_are_numbers():
    config = FinetuneConfig(
        model="m", dataset="d", seed=np.int64(3), eps=np.float64(0.25), lr=np.float32(0.5)
    ).validate()
    assert (config.seed, type(config.seed), config.lr) == (3, int, 0.5)
    with pytest.raises(ConfigError, match=r"--seed 3\.0 is not a whole number"):
        FinetuneConfig(model="m", dataset="d", seed=3.0).validate()


def test_arguments_that_are_no_architectures_are_refused_with_the_rest():
    config = FinetuneConfig(model="resnet18_cifar", dataset="d", model_args={"checkpoint_path": "x"}, epochs=0)
    with pytest.raises(ConfigError) as error:
        config.validate()
    assert any(problem.startswith("--model-args checkpoint_path: that says") for problem in error.value.problems)
    assert len(error.value.problems) == 2
