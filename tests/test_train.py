"""Whole runs, small enough for a second or two each."""

import json
import math
import multiprocessing
import random

import numpy as np
import pytest
import timm
import torch
import transformers
import yaml
from safetensors.torch import load_file
from steady_main import steady_ball, steady_pgd
from timm.utils import ModelEmaV3
from tiny import NAMES, tiny_config, write_images, write_model

import arrest_hub.epoch_validation as epoch_validation
import arrest_hub.loop as loop
import arrest_hub.step as step_module
from arrest_hub import train
from arrest_hub.backbones import load_backbone
from arrest_hub.card_facts import read_card, read_publication
from arrest_hub.cli import eval_command, parse_finetune
from arrest_hub.config_sources import load_config
from arrest_hub.errors import ArrestError, BackboneError, ConfigError, DataError
from arrest_hub.export import write_model_folder
from arrest_hub.fields import small_radius
from arrest_hub.hub import card_for
from arrest_hub.results import read_results
from arrest_hub.throughput import TIMED
from arrest_hub.train import dry_run, finetune
from arrest_hub.training_record import read_record


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def log_lines(run, drop=TIMED):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in drop} for line in lines]


def weights(run):
    return load_file(run / "export" / "model.safetensors")


def same_weights(first, second):
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


EXPORT = {"README.md", "config.json", "model.safetensors", "results.json", "training_config.yaml",
          "training_record.json", "verdicts.parquet", "figures/per_class.png", "figures/gallery.png",
          "figures/drift.png", "figures/training.png"}  # fmt: skip
STATE = {"manifest.json", "model.safetensors", "optimizer.bin", "progress.json", "random_states_0.pkl"}


def test_a_run_from_a_model_folder_end_to_end(tmp_path, capsys):
    config = tiny_config(tmp_path, figures=True)
    run = finetune(config)
    (best,) = (path.name for path in (tmp_path / "run" / "checkpoints").glob("best-*"))
    # 48 training images, 12 held out: 4 steps an epoch
    assert files(tmp_path / "run") == (
        {".lock", "config.yaml", "log.jsonl"}
        | {f"export/{name}" for name in EXPORT}
        | {f"checkpoints/step-000008/{name}" for name in STATE}
        | {f"checkpoints/last/{name}" for name in ("config.json", "model.safetensors")}
        | {f"checkpoints/{best}/{name}" for name in ("config.json", "model.safetensors")}
    )
    report = read_results(run.export / "results.json")
    assert report.to_json() == run.report.to_json()
    assert [(row.metric, row.attack, row.n) for row in report.results] == [
        ("clean_accuracy", None, 48),
        ("robust_accuracy", "pgd-1", 48),
    ]
    assert report.results[1].eps == "8/255"
    assert len(report.teacher_results) == 2
    assert load_config(tmp_path / "run" / "config.yaml").output_dir == str(tmp_path / "run")

    lines = log_lines(tmp_path / "run")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [2, 4, 6, 8]
    assert {
        "phase", "step", "epoch", "loss", "cross_entropy", "distance", "drift", "drift_p50", "drift_p90", "drift_max",
        "replay_rate", "clean_accuracy", "adversarial_accuracy", "zero_gradient_share", "attack_steps", "lr",
    } == set(steps[0])  # fmt: skip
    assert all(math.isfinite(value) for line in steps for value in line.values() if isinstance(value, float))
    assert [line["step"] for line in lines if "validation_harmonic_mean" in line] == [4, 8]
    waits = [line["data_wait"] for line in log_lines(tmp_path / "run", drop=()) if "loss" in line]
    assert all(0 < wait < 1 for wait in waits), "the share of the time without work"

    out = capsys.readouterr().out
    for part in ("model ", "teacher ", "36 training", "12 validation", "48 test", "eps 8/255", "2 attack", "output"):
        assert part in out
    assert "student (arrest)" in out

    # the export is what plain timm loads, with the same logits
    plain = timm.create_model(f"local-dir:{run.export}", pretrained=True).eval()
    backbone = load_backbone(str(run.export))
    pixels = torch.rand(4, 3, 8, 8)
    data = timm.data.resolve_model_data_config(plain)
    mean, std = (torch.tensor(data[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        assert torch.allclose(plain((pixels - mean) / std), backbone(pixels).logits, atol=1e-5)
    assert backbone.label_names == NAMES
    card = (run.export / "README.md").read_text()
    assert "8/255" in card
    assert f"{100 * report.results[0].value:.1f} %" in card
    for name in EXPORT:
        assert str(tmp_path).encode() not in (run.export / name).read_bytes(), "paths are nobody's business"
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "timm"


@pytest.mark.parametrize("own", [True, False])
def test_the_record_tells_what_the_weights_were_chosen_on(tmp_path, own):
    write_images(tmp_path / "data", splits=("train", "validation", "test") if own else ("train", "test"))
    run = finetune(tiny_config(tmp_path, epochs=1, max_steps=1))
    data = read_record(run.export / "training_record.json").data
    assert data.validation == ("validation" if own else "train[held-out validation]")
    assert data.chosen_on == ("validation" if own else None)
    assert (data.num_examples, data.split) == ((48, "train") if own else (36, "train[without held out]"))


def test_training_changes_the_weights_and_lowers_the_loss(tmp_path):
    config = tiny_config(tmp_path, epochs=6, lr=0.1, export_weights="last", rgkd_weight=1.0)
    finetune(config)
    losses = [line["loss"] for line in log_lines(tmp_path / "run") if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    before = load_file(tmp_path / "model" / "model.safetensors")
    after = weights(tmp_path / "run")
    assert all(not torch.equal(before[name], after[name]) for name in before if name.endswith("conv1.weight"))


def test_a_run_repeats_bit_for_bit(tmp_path):
    finetune(tiny_config(tmp_path, output_dir=str(tmp_path / "a")))
    torch.rand(7)  # what else the process draws plays no part
    finetune(tiny_config(tmp_path, output_dir=str(tmp_path / "b")))
    assert same_weights(tmp_path / "a", tmp_path / "b")
    assert log_lines(tmp_path / "a") == log_lines(tmp_path / "b")
    finetune(tiny_config(tmp_path, output_dir=str(tmp_path / "c"), seed=1))
    assert not same_weights(tmp_path / "a", tmp_path / "c")


def test_the_attack_grows_and_spares_what_is_misclassified(tmp_path, capsys):
    """Twelve steps of training with one, two and three steps of attack; replay off, so that all are attacked."""
    changes = {"attack_steps": 3, "attack_steps_start": 1, "replay_threshold": None, "log_every": 1}
    finetune(tiny_config(tmp_path, output_dir=str(tmp_path / "grows"), **changes))
    out = capsys.readouterr().out
    assert "PGD-1 at the start, growing to PGD-3" in out
    steps = [line["attack_steps"] for line in log_lines(tmp_path / "grows") if "loss" in line]
    assert steps == sorted(steps)
    assert set(steps) == {1, 2, 3}
    finetune(tiny_config(tmp_path, output_dir=str(tmp_path / "spares"), attack_stop_after=1, **changes))
    assert "until 1 step after an image is misclassified" in capsys.readouterr().out
    spared = [line["attack_steps"] for line in log_lines(tmp_path / "spares") if "loss" in line]
    assert all(1 <= some <= all_ for some, all_ in zip(spared, steps, strict=True))
    assert sum(spared) < sum(steps)


class Killed(BaseException):
    pass


def kill_at(monkeypatch, phase, step):
    """The run dies when it has trained ``step`` steps of ``phase``, before anything is written for that step."""
    plain = loop._log

    def log(run, now, progress, values, bar):
        if (now, progress.step) == (phase, step):
            raise Killed
        plain(run, now, progress, values, bar)

    monkeypatch.setattr(loop, "_log", log)
    return lambda: monkeypatch.setattr(loop, "_log", plain)


INGREDIENTS = {
    "ema_decay": 0.9, "ema_start_epoch": 0.75, "lr_hold": 0.5, "awp_gamma": 0.01, "eps_spread": 0.5,
    "eps_train": "10/255", "label_smoothing": 0.1, "augment": "trivialaugment", "random_erasing": 0.5,
    "freeze_head": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("step", "changes"),
    [
        (7, {"checkpoint_every": 3}),  # goes on from step 6, in the middle of the second epoch
        (6, {}),  # goes on from the end of the first epoch
        (7, {"checkpoint_every": 3, "mixed_precision": "bf16"}),
        (
            7,
            {
                "checkpoint_every": 2,
                "ema_decay": 0.9,
                "grad_accum_steps": 2,
                "epochs": 5,
                "optimizer": "adamw",
                "attack_steps": 3,
                "attack_steps_start": 1,
                "attack_stop_after": 1,
            },
        ),
        (2, {"checkpoint_every": 3}),  # no checkpoint yet: starts again
        (7, {"checkpoint_every": 2} | INGREDIENTS),
    ],
)
def test_resume_equals_uninterrupted(tmp_path, monkeypatch, step, changes):
    changes = {"log_every": 1} | changes
    finetune(tiny_config(tmp_path, output_dir=str(tmp_path / "whole"), **changes))
    revive = kill_at(monkeypatch, "robust", step)
    with pytest.raises(Killed):
        finetune(tiny_config(tmp_path, output_dir=str(tmp_path / "cut"), **changes))
    revive()
    torch.manual_seed(99)
    finetune(tiny_config(tmp_path, output_dir=str(tmp_path / "cut"), resume=True, **changes))
    assert same_weights(tmp_path / "whole", tmp_path / "cut")
    assert files(tmp_path / "whole") == files(tmp_path / "cut")
    assert log_lines(tmp_path / "whole") == log_lines(tmp_path / "cut")
    first, second = (read_results(tmp_path / name / "export" / "results.json") for name in ("whole", "cut"))
    assert [row.correct for row in first.results] == [row.correct for row in second.results]


SCRATCH = {
    "model": "resnet18_cifar",
    "model_args": {"channels": [16, 16, 16, 16]},
    "image_size": 8,
    "standard_epochs": 2,
}


def test_standard_phase_makes_the_teacher_and_resumes(tmp_path, monkeypatch):
    finetune(tiny_config(tmp_path, output_dir=str(tmp_path / "whole"), log_every=1, **SCRATCH))
    assert {"teacher/config.json", "teacher/model.safetensors"} <= files(tmp_path / "whole")
    phases = [line["phase"] for line in log_lines(tmp_path / "whole")]
    assert phases == sorted(phases, reverse=True), "standard, then robust"
    for phase, step in (("standard", 6), ("robust", 6)):
        revive = kill_at(monkeypatch, phase, step)
        output = tmp_path / f"cut-{phase}"
        with pytest.raises(Killed):
            finetune(tiny_config(tmp_path, output_dir=str(output), log_every=1, **SCRATCH))
        assert (output / "teacher").exists() == (phase == "robust")
        revive()
        finetune(tiny_config(tmp_path, output_dir=str(output), log_every=1, resume=True, **SCRATCH))
        assert same_weights(tmp_path / "whole", output)
        assert log_lines(tmp_path / "whole") == log_lines(output)


def test_a_licence_that_is_given_is_the_cards(tmp_path):
    """Whoever pushes later, without a word of it, publishes under that one and not under the base's."""
    run = finetune(tiny_config(tmp_path, license="cc-by-nc-4.0", max_steps=1, limit_eval=6))
    publication = read_publication(read_card(run.export / "README.md"))
    assert publication.license.id == "cc-by-nc-4.0"
    assert b"license: cc-by-nc-4.0\n" in card_for(run.export, "me/model", None)


def test_a_radius_that_is_next_to_nothing_is_told(tmp_path, capsys):
    finetune(tiny_config(tmp_path, norm="l2", max_steps=1, limit_eval=6, output_dir=str(tmp_path / "small")))
    assert "threat      l2, eps 8/255 (next to nothing in l2: usual are 0.5 on 32 px" in capsys.readouterr().out
    assert small_radius("l2", "0.5") == small_radius("linf", "1/255") == small_radius("l1", "12") == ""


def test_new_head_for_other_classes(tmp_path):
    model = write_model(tmp_path / "five", ["a", "b", "c", "d", "e"])
    with pytest.raises(ConfigError, match="standard-epochs"):
        finetune(tiny_config(tmp_path, model=str(model)))
    assert not (tmp_path / "run").exists()
    run = finetune(tiny_config(tmp_path, model=str(model), standard_epochs=1))
    exported = load_backbone(str(run.export))
    assert exported.num_classes == 3
    assert exported.label_names == NAMES


def test_a_head_is_not_thrown_away_for_the_order_of_its_classes(tmp_path, capsys):
    model = write_model(tmp_path / "permuted", ["light", "dark", "middle"])
    changes = {"model": str(model), "standard_epochs": 1, "max_steps": 1, "limit_eval": 6}
    with pytest.raises(ConfigError, match=r"same 3 class names in another order.*--label-match name"):
        finetune(tiny_config(tmp_path, **changes))
    finetune(tiny_config(tmp_path, label_match="name", **changes))
    assert "head: kept, 3 classes; labels matched by name" in capsys.readouterr().out


def test_permuted_classes_are_reported_and_remapped(tmp_path):
    order = ["light", "dark", "middle"]
    write_model(tmp_path / "model", NAMES)
    finetune(tiny_config(tmp_path, output_dir=str(tmp_path / "straight"), lr=1e-9))
    permuted = write_model(tmp_path / "permuted", order)
    # the same network with its output rows in the other order
    state = load_file(tmp_path / "model" / "model.safetensors")
    rows = [NAMES.index(name) for name in order]
    from safetensors.torch import save_file

    state["fc.weight"], state["fc.bias"] = state["fc.weight"][rows].clone(), state["fc.bias"][rows].clone()
    save_file(state, permuted / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="label-match name"):
        finetune(tiny_config(tmp_path, model=str(permuted)))
    finetune(
        tiny_config(tmp_path, model=str(permuted), label_match="name", lr=1e-9, output_dir=str(tmp_path / "remapped"))
    )
    first, second = (read_results(tmp_path / name / "export" / "results.json") for name in ("straight", "remapped"))
    assert first.teacher_results[0].correct == second.teacher_results[0].correct


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "at"},
        {"method": "trades", "norm": "l2", "eps": "0.5"},
        {"method": "at", "init": "random"},
        {"method": "arrest", "init": "random"},
        {"rgkd_weight": 0.0, "replay_threshold": None},
        {"replay_threshold": None, "mixed_precision": "bf16", "clip_grad": 1.0},
        {"method": "at", "init": "random"} | {k: v for k, v in SCRATCH.items() if k != "standard_epochs"},
        {"validation_size": 0, "warmup_epochs": 0.5, "scheduler": "multistep"},
        {"streaming": True, "max_steps": 5},
        {"num_workers": 1, "limit_train": 30, "limit_eval": 9},
        {"log_with": "tensorboard"},
        {"rgkd_input": "clean", "replay_by": "batch", "replay_with": "clean"},
        {"method": "trades", "awp_gamma": 0.01, "label_smoothing": 0.1, "mixed_precision": "bf16"},
        {"method": "at", "eps_spread": 1.0, "freeze_head": True},
    ],
    ids=lambda changes: "-".join(f"{key}={value}" for key, value in changes.items() if key not in SCRATCH),
)
def test_variants_run(tmp_path, changes):
    run = finetune(tiny_config(tmp_path, **changes))
    lines = [line for line in log_lines(tmp_path / "run") if "loss" in line]
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert run.report.results[0].n == min(48, changes.get("limit_eval", 48))
    scratch = "model" in changes
    assert bool(run.report.teacher_results) != scratch
    if changes.get("replay_threshold", 0) is None:
        assert "replay_rate" not in lines[0]
    if changes.get("validation_size") == 0:
        assert not list((tmp_path / "run" / "checkpoints").glob("best*"))
    if "log_with" in changes:
        assert list((tmp_path / "run").rglob("events.out.tfevents*"))


def test_the_plan_says_what_is_beside_the_method(tmp_path, capsys):
    finetune(tiny_config(tmp_path, max_steps=4, **INGREDIENTS))
    out = capsys.readouterr().out
    assert (
        ", augment trivialaugment, random-erasing 0.5, awp-gamma 0.01, label-smoothing 0.1, lr-hold 0.5, averaged "
        "weights (0.9 from epoch 0.75), frozen head;"
    ) in out
    assert "eps 8/255; in training eps 10/255; PGD-2, step 0.04902, eps of each image within 50% of it" in out
    assert "2 attack, 1 training, 1 teacher, 1 drift, 1 sensitivity, 1 perturbation" in out


def test_a_frozen_head_stays_the_teachers(tmp_path):
    finetune(tiny_config(tmp_path, freeze_head=True, lr=0.1, export_weights="last"))
    before, after = load_file(tmp_path / "model" / "model.safetensors"), weights(tmp_path / "run")
    heads = [name for name in before if name.startswith("fc.")]
    assert len(heads) == 2
    for name in before:
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(before[name], after[name]) == (name in heads), name


def test_the_learning_rate_is_held_after_the_warm_up(tmp_path):
    finetune(tiny_config(tmp_path, epochs=4, lr=0.1, lr_hold=0.4, warmup_epochs=1, log_every=1))
    held = [line["lr"] for line in log_lines(tmp_path / "run") if "loss" in line]
    finetune(tiny_config(tmp_path, epochs=4, lr=0.1, warmup_epochs=1, log_every=1, output_dir=str(tmp_path / "free")))
    free = [line["lr"] for line in log_lines(tmp_path / "free") if "loss" in line]
    warm = len(free) // 4
    assert min(free[: warm - 1]) < 0.04, "the warm-up begins below"
    assert held[: warm - 1] == free[: warm - 1]
    assert held[warm:] == pytest.approx([max(0.04, lr) for lr in free[warm:]])
    assert held[-1] == pytest.approx(0.04)


@pytest.mark.parametrize("start", [0.0, 1.25])
def test_weights_are_averaged_from_an_epoch_on(tmp_path, monkeypatch, start):
    """Against the average written out: until the start, and with its last step, it is the weights themselves."""
    seen = []
    update = ModelEmaV3.update

    def watched(self, model, step=None):
        seen.append({name: value.detach().clone().double() for name, value in model.named_parameters()})
        update(self, model, step=step)

    monkeypatch.setattr(ModelEmaV3, "update", watched)
    changes = {"ema_decay": 0.8, "ema_start_epoch": start, "export_weights": "last", "eval_every": 0}
    finetune(tiny_config(tmp_path, **changes))
    per_epoch = len(seen) // 2
    first = max(1, round(start * per_epoch))
    average = seen[first - 1]
    for later in seen[first:]:
        average = {name: 0.8 * value + 0.2 * later[name] for name, value in average.items()}
    exported = load_backbone(str(tmp_path / "run" / "export"))
    for name, value in exported.named_parameters():
        assert torch.allclose(value.double(), average[name], atol=1e-6), name
    assert any(not torch.allclose(average[name], seen[-1][name], atol=1e-5) for name in average)


@pytest.mark.parametrize("standard_epochs", [0, 1])
@pytest.mark.parametrize("init", ["pretrained", "random"])
def test_what_is_dropped_is_dropped_in_robust_training(tmp_path, monkeypatch, capsys, standard_epochs, init):
    """Also where the network comes from the folder of the clean phase, which does not tell of it."""
    rates, plain = [], train.TrainingPhase

    def look(run, phase, student, *args, **kwargs):
        rates.append((phase, student.head.dropout.p))
        return plain(run, phase, student, *args, **kwargs)

    monkeypatch.setattr(train, "TrainingPhase", look)
    timm.models.save_for_hf(
        timm.create_model("test_vit", img_size=16, num_classes=3), tmp_path / "vit", safe_serialization=True,
        model_config={"label_names": NAMES}, data_config={"input_size": (3, 16, 16)},
    )  # fmt: skip
    run = finetune(
        tiny_config(
            tmp_path, model=str(tmp_path / "vit"), model_args={"drop_rate": 0.25}, standard_epochs=standard_epochs,
            init=init, max_steps=1, image_size=16,
        )
    )  # fmt: skip
    assert rates == [("standard", 0.25)] * standard_epochs + [("robust", 0.25)]
    assert "drop_rate=0.25)" in capsys.readouterr().out, "what was asked for is in the plan"
    assert timm.create_model(f"local-dir:{run.export}", pretrained=True) is not None


def test_random_initialisation_starts_elsewhere(tmp_path):
    finetune(tiny_config(tmp_path, init="random", lr=1e-9, export_weights="last"))
    before, after = load_file(tmp_path / "model" / "model.safetensors"), weights(tmp_path / "run")
    assert not torch.allclose(before["conv1.weight"], after["conv1.weight"], atol=1e-3)


def test_a_transformers_model(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=4,
            id2label=dict(enumerate(NAMES)),
            label2id={n: i for i, n in enumerate(NAMES)},
            **sizes,
        )
    )
    model.save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
    run = finetune(tiny_config(tmp_path, model=str(tmp_path / "vit"), epochs=1))
    assert files(run.export) == {name for name in EXPORT if "figures" not in name} | {"preprocessor_config.json"}
    plain = ViTForImageClassification.from_pretrained(run.export).eval()
    pixels = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(
            plain((pixels - 0.5) / 0.5).logits, load_backbone(str(run.export))(pixels).logits, atol=1e-5
        )


def test_best_weights_are_exported(tmp_path, monkeypatch):
    scores = iter([0.9, 0.1, 0.3])
    plain = epoch_validation.count_correct

    def scored(*args, **kwargs):
        counts = plain(*args, **kwargs)
        return counts._replace(clean=10, n=10, robust=int(10 * next(scores)))

    monkeypatch.setattr(epoch_validation, "count_correct", scored)
    finetune(tiny_config(tmp_path, epochs=3, lr=0.1))
    best = load_file(tmp_path / "run" / "checkpoints" / "best-000004" / "model.safetensors")
    last = load_file(tmp_path / "run" / "checkpoints" / "last" / "model.safetensors")
    exported = weights(tmp_path / "run")
    assert torch.equal(exported["conv1.weight"], best["conv1.weight"])
    assert not torch.equal(exported["conv1.weight"], last["conv1.weight"])


def test_validation_workers_do_not_pile_up(tmp_path, monkeypatch):
    alive = []
    plain = loop.validate

    def validate(*args):
        plain(*args)
        alive.append(len(multiprocessing.active_children()))

    monkeypatch.setattr(loop, "validate", validate)
    finetune(tiny_config(tmp_path, epochs=3, num_workers=1))
    assert alive == [alive[0]] * 3, "one worker for training and one for validation, however many epochs"


def test_output_folder_is_never_overwritten_unasked(tmp_path):
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="not a run"):
            finetune(tiny_config(tmp_path, output_dir=str(stranger), overwrite=overwrite))
    assert files(stranger) == {"thesis.tex"}
    finetune(tiny_config(tmp_path, epochs=1))
    before = (tmp_path / "run" / "log.jsonl").read_text()
    with pytest.raises(ConfigError, match="--resume"):
        finetune(tiny_config(tmp_path, epochs=1))
    with pytest.raises(BackboneError):
        finetune(tiny_config(tmp_path, epochs=1, overwrite=True, model=str(tmp_path / "nowhere")))
    with pytest.raises(ConfigError, match="would delete --model"):
        finetune(tiny_config(tmp_path, epochs=1, overwrite=True, model=str(tmp_path / "run" / "export")))
    assert (tmp_path / "run" / "log.jsonl").read_text() == before, "an old run outlives a new one that cannot start"
    finetune(tiny_config(tmp_path, epochs=1, overwrite=True, seed=3))
    assert load_config(tmp_path / "run" / "config.yaml").seed == 3


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batch_size": 64}, ConfigError, "64.*36"),
        ({"mixed_precision": "fp16"}, ConfigError, "fp16"),
        ({"optimizer": "sdg"}, ConfigError, "sgd"),
        ({"optimizer": "adahessian"}, ConfigError, "--optimizer adahessian does not work here .*require grad"),
        ({"max_steps": 4, "ema_decay": 0.9, "ema_start_epoch": 1}, ConfigError, "--ema-start-epoch 1 is step 4, .*4"),
        ({"model": "resnet18_cifr"}, BackboneError, "resnet18_cifar"),
        ({"model": "resnet18_cifar", "image_size": 8}, ConfigError, "standard-epochs"),
        ({"dataset": "cifar01"}, DataError, "cifar10"),
        ({"log_with": "wandb"}, ConfigError, "pip install wandb"),
        ({"log_with": "wandb", "optimizer": "sdg", "mixed_precision": "fp16"}, ConfigError, "(?s)sgd.*fp16.*wandb"),
        ({"lr": -1.0, "eps": "8", "epochs": 0}, ConfigError, "(?s)--eps.*|--lr.*--epochs"),
    ],
)
def test_bad_input_writes_nothing(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        finetune(tiny_config(tmp_path, **changes))
    assert not (tmp_path / "run").exists()


def test_a_corrupt_image_is_one_clear_error(tmp_path):
    from datasets import Dataset, Image

    write_images(tmp_path / "data")
    path = tmp_path / "data" / "train-00000-of-00001.parquet"
    data = Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache")).cast_column("img", Image(decode=False))
    rows = data.to_list()
    rows[0]["img"] = {"bytes": rows[0]["img"]["bytes"][:40], "path": None}
    Dataset.from_list(rows, features=data.features).to_parquet(str(path))
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"train.*image 0") as caught:
            finetune(tiny_config(tmp_path, validation_size=0, num_workers=workers, overwrite=True))
        assert "Traceback" not in str(caught.value)


def test_bf16_where_the_gpu_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(ConfigError, match="bfloat16"):
        finetune(tiny_config(tmp_path, mixed_precision="bf16"))


def test_processes_that_do_not_find_each_other_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")  # four processes that nobody joined
    with pytest.raises(ConfigError, match="4 processes"):
        finetune(tiny_config(tmp_path))


@pytest.mark.parametrize("lr", [1e20, 1e6])
def test_a_diverging_run_stops_and_exports_nothing(tmp_path, lr):
    with pytest.raises(ArrestError, match="diverged"):
        finetune(tiny_config(tmp_path, lr=lr, epochs=4))
    assert not (tmp_path / "run" / "export").exists()


def test_weights_that_are_not_finite_are_not_exported(tmp_path, monkeypatch):
    plain = loop.TrainingPhase.train

    def poisoned(self):
        progress = plain(self)
        with torch.no_grad():
            next(self.student.parameters()).fill_(math.nan)
        return progress

    monkeypatch.setattr(loop.TrainingPhase, "train", poisoned)
    with pytest.raises(ArrestError, match="not finite"):
        finetune(tiny_config(tmp_path, epochs=1))
    assert not (tmp_path / "run" / "export").exists()


def test_the_folder_of_a_run_that_never_got_anywhere_can_be_used_again(tmp_path, monkeypatch):
    revive = kill_at(monkeypatch, "robust", 2)
    with pytest.raises(Killed):
        finetune(tiny_config(tmp_path))
    revive()
    finetune(tiny_config(tmp_path, seed=5))
    assert load_config(tmp_path / "run" / "config.yaml").seed == 5
    assert [line["step"] for line in log_lines(tmp_path / "run") if "loss" in line] == [2, 4, 6, 8]


def test_a_dead_data_loading_process_is_one_clear_error(tmp_path, monkeypatch):
    # raised as torch's signal handler does, in the middle of a step; a process really killed here could also have
    # the handler raise in the middle of pytest
    def interrupted(batch):
        raise RuntimeError("DataLoader worker (pid 4242) is killed by signal: Killed.")

    monkeypatch.setattr(step_module, "to_pixels", interrupted)
    with pytest.raises(DataError, match="--num-workers"):
        finetune(tiny_config(tmp_path))


def test_other_runtime_errors_stay_what_they_are(tmp_path, monkeypatch):
    def broken(batch):
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(step_module, "to_pixels", broken)
    with pytest.raises(RuntimeError, match="CUDA error"):
        finetune(tiny_config(tmp_path))


def test_the_planned_length_is_what_is_run(tmp_path, capsys):
    finetune(tiny_config(tmp_path, max_steps=60, epochs=1, grad_accum_steps=3))
    out = capsys.readouterr().out
    assert "1 step (1 epoch)" in out, "four batches are enough for one step of three"
    assert "step 1)" in out


def headless_folder(library, folder):
    """A network without a head, as its library saves it."""
    if library == "timm":
        net = timm.create_model("test_resnet", num_classes=0, pretrained=False)
        timm.models.save_for_hf(net, folder, safe_serialization=True, data_config={"input_size": (3, 16, 16)})
        return
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_a_network_without_a_head_gets_one_from_the_clean_phase(library, tmp_path, capsys):
    headless_folder(library, tmp_path / "net")
    changes = {"model": str(tmp_path / "net"), "max_steps": 1, "validation_size": 0, "limit_eval": 6}
    with pytest.raises(BackboneError, match="--standard-epochs"):
        finetune(tiny_config(tmp_path, **changes))
    run = finetune(tiny_config(tmp_path, standard_epochs=1, output_dir=str(tmp_path / "me@corp" / "run"), **changes))
    assert "head: new, 3 classes (the model had none)" in capsys.readouterr().out
    assert "me@corp" not in (run.export / "results.json").read_text(), "a path with @ is no id on the Hub"
    if library == "timm":
        assert timm.create_model(f"local-dir:{run.export}", pretrained=True).num_classes == 3
    else:
        loaded = transformers.AutoModelForImageClassification.from_pretrained(run.export)
        assert loaded.config.id2label == dict(enumerate(NAMES))
    assert load_backbone(run.export).label_names == load_backbone(run.path / "teacher").label_names == NAMES


def test_the_launchers_settings_do_not_change_what_was_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    run = finetune(tiny_config(tmp_path, epochs=1, eval_every=0))
    lines = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["step"]) for line in lines if "loss" in line] == [(0, 2), (0, 4)]
    out = capsys.readouterr().out
    assert "the launcher's mixed precision, bf16, is not used" in out
    assert "precision no" in out


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_in_a_context_without_gradients(mode, tmp_path):
    with mode():
        run = finetune(tiny_config(tmp_path, max_steps=1, validation_size=0, limit_eval=6))
    assert run.report.get("clean_accuracy").n == 6


def test_a_dry_run_from_python_has_its_own_name(tmp_path):
    with pytest.raises(ConfigError, match=r"arrest_hub\.dry_run"):
        finetune(tiny_config(tmp_path, dry_run=True))
    assert not (tmp_path / "run").exists()


def test_a_dry_run_of_a_finished_run_touches_nothing(tmp_path):
    config = tiny_config(tmp_path, epochs=1)
    finetune(config)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert any(line.startswith("in all") for line in dry_run(config))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_resume_without_a_run_starts_one_and_says_so(tmp_path, capsys):
    finetune(tiny_config(tmp_path, epochs=1, resume=True))
    assert "no checkpoint" in capsys.readouterr().out


def test_resuming_with_another_model_revision_is_refused(tmp_path):
    finetune(tiny_config(tmp_path, epochs=1))
    path = tmp_path / "run" / "checkpoints" / "step-000004" / "progress.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_revision": "abc"}))
    with pytest.raises(ConfigError, match="abc"):
        finetune(tiny_config(tmp_path, epochs=1, resume=True))


def vit_folder(folder):
    """A network without BatchNorm, as a model folder."""
    torch.manual_seed(0)
    vit = load_backbone(
        "vit_tiny_patch16_224", num_classes=3, image_size=8, model_args={"patch_size": 4, "embed_dim": 12, "depth": 1}
    )
    vit.label_names = NAMES
    write_model_folder(vit, folder)
    return str(folder)


@pytest.mark.parametrize("method", ["arrest", "at"])
def test_accumulated_batches_equal_one_large_batch(method, tmp_path, monkeypatch):
    """36 images: seven batches of five, so that each epoch's seventh is not enough for a step of two."""
    monkeypatch.setattr(train, "pgd", steady_pgd)
    monkeypatch.setattr(train, "random_in_ball", steady_ball)
    model = vit_folder(tmp_path / "vit")
    for name, batch, accumulated in (("one", 10, 1), ("two", 5, 2)):
        finetune(
            tiny_config(tmp_path, model=model, output_dir=str(tmp_path / name), batch_size=batch, method=method,
                        grad_accum_steps=accumulated, weight_decay=0.1, momentum=0.5)
        )  # fmt: skip
    before = load_file(f"{model}/model.safetensors")
    one, two = (load_file(tmp_path / name / "checkpoints" / "last" / "model.safetensors") for name in ("one", "two"))
    assert any((one[name] - before[name]).abs().max() > 1e-3 for name in before)
    for name in before:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-5)


def test_a_step_needs_as_many_batches_as_it_accumulates(tmp_path):
    with pytest.raises(ConfigError, match="--grad-accum-steps 5 is more than the 4 batches"):
        finetune(tiny_config(tmp_path, grad_accum_steps=5))


def test_a_stream_of_unknown_length_drops_half_a_step(tmp_path, monkeypatch):
    """The gradients of batches that are not enough for a step do not leak into the next epoch's."""
    plain = train.prepare_data

    def unknown(config, accelerator):
        splits = plain(config, accelerator)
        splits.train.num_examples = None
        return splits

    monkeypatch.setattr(train, "prepare_data", unknown)
    seen = []
    steps = loop.train_step

    def step(accelerator, model, *rest):
        seen.append(sum(p.grad is not None and bool(p.grad.any()) for p in model.parameters()))
        return steps(accelerator, model, *rest)

    monkeypatch.setattr(loop, "train_step", step)
    finetune(tiny_config(tmp_path, streaming=True, max_steps=2, grad_accum_steps=3, log_every=1))
    # four batches an epoch: a step of three, one that is dropped, and a step of three
    assert len(seen) == 7
    assert [number for number, dirty in enumerate(seen) if dirty] == [1, 2, 5, 6]


def test_a_home_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    """A shell leaves it where it stands behind an equals sign, and a recipe always."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    changes = {"max_steps": 1, "limit_eval": 6, "standard_epochs": 1}
    run = finetune(tiny_config(tmp_path, output_dir="~/runs/mine", **changes))
    assert run.export == tmp_path / "runs" / "mine" / "export"
    finetune(tiny_config(tmp_path, output_dir="~/runs/mine", resume=True, **changes))
    command = ["--resume", "--output-dir=~/runs/mine"]
    assert parse_finetune(command)[0].output_dir == str(tmp_path / "runs" / "mine")
    (tmp_path / "runs" / "config.yaml").touch()
    with pytest.raises(ConfigError, match="--overwrite would delete --model ~/runs/mine/teacher"):
        finetune(tiny_config(tmp_path, model="~/runs/mine/teacher", output_dir=str(tmp_path / "runs"), overwrite=True))
    evaluation = ["--dataset", str(tmp_path / "data"), "--attacks", "noise", "--output-dir=~/evals", "--num-workers=0",
                  "--limit-eval=6", "--no-checks", "--no-figures", "--teacher=none"]  # fmt: skip
    eval_command(["~/runs/mine/export", *evaluation])
    assert (tmp_path / "evals" / "results.json").is_file()
    assert not (tmp_path / "~").exists()


def test_too_much_accumulation_is_said_before_anything_is_overwritten(tmp_path):
    finetune(tiny_config(tmp_path, max_steps=1, limit_eval=6))
    before = files(tmp_path)
    with pytest.raises(ConfigError, match="--grad-accum-steps 100 is more than the 4 batches of an epoch"):
        finetune(tiny_config(tmp_path, overwrite=True, grad_accum_steps=100))
    assert files(tmp_path) == before


def test_random_states_are_the_callers(tmp_path):
    def drawn():
        return random.random(), float(np.random.rand()), float(torch.rand(1))

    def seeded():
        random.seed(5)
        np.random.seed(5)
        torch.manual_seed(5)

    seeded()
    expected = drawn()
    seeded()
    finetune(tiny_config(tmp_path, epochs=1, max_steps=1))
    assert drawn() == expected
    seeded()
    dry_run(tiny_config(tmp_path, output_dir=str(tmp_path / "other")))
    assert drawn() == expected
