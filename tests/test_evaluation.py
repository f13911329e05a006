"""`arrest_hub.evaluate` and `arrest-eval`: figures, verdicts, resumption, the record, bad input."""

import copy
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from tiny import (
    NAMES,
    LogitsOnly,
    TinyClassifier,
    patterns,
    robust_net,
    smooth_net,
    tiny_backbone,
    tiny_config,
    write_images,
    write_model,
)
from torch import nn

import arrest_hub
from arrest_hub import run_folder
from arrest_hub.attacks import frozen_eval
from arrest_hub.backbones import load_backbone
from arrest_hub.cli import eval_command, parse_eval
from arrest_hub.command import run_cli
from arrest_hub.config import FinetuneConfig
from arrest_hub.errors import ArrestError, BackboneError, ConfigError
from arrest_hub.eval_config import EvalConfig
from arrest_hub.eval_record import update_export
from arrest_hub.eval_subjects import find_teacher
from arrest_hub.evaluation import run_evaluation
from arrest_hub.export import write_model_folder
from arrest_hub.pretrained import PretrainedClassifier
from arrest_hub.results import CHANCE, TRANSFER, Check, CurvePoint, EvalReport, Result, read_results
from arrest_hub.train import finetune
from arrest_hub.training_record import FILE_NAME as RECORD
from arrest_hub.verdicts import Verdicts, read_verdicts

EPS = "26/255"
pytestmark = pytest.mark.usefixtures("few_iterations")


def run(net=None, pair=None, **options):
    options = {"attacks": "pgd-5", "eps": EPS, "checks": False, "teacher": None} | options
    config = EvalConfig(model="net", dataset="given", **options)
    return run_evaluation(config, module=net or robust_net(), pair=pair or patterns(48, 4, seed=7), write=False)


def test_clean_and_pgd_equal_a_plain_loop():
    net, (pixels, labels) = smooth_net(4).train(), patterns(30, 4, seed=7)
    net.load_state_dict(robust_net().state_dict())
    labels[:5] = (labels[:5] + 1) % 4
    found = run(net, (pixels, labels), batch_size=7)
    assert net.training, "left as it was"
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())
    with torch.no_grad():
        right = net(pixels).argmax(1) == labels
    assert torch.equal(torch.from_numpy(found.verdicts.clean_correct), right)
    clean, pgd = found.report.results
    assert (clean.correct, clean.n) == (int(right.sum()), 30)
    assert 0 < pgd.correct < clean.correct
    assert found.verdicts.broken_by["pgd-5"][0] == "clean"
    assert found.report.precision == "fp32"
    assert found.report.images_per_second > 0


def test_worst_case_over_restarts_is_per_sample():
    """Every image that one start breaks stays broken, and more starts break more."""
    # steps so small that the random start decides
    one, many = (
        run(attacks="pgd-4", eps="28/255", pgd_step_size="8/255", pgd_restarts=restarts) for restarts in (1, 8)
    )
    fallen = [~found.verdicts.stands("pgd-4") for found in (one, many)]
    assert not (fallen[0] & ~fallen[1]).any()
    assert fallen[1].sum() > fallen[0].sum()
    assert many.report.get("robust_accuracy").attack_parameters["restarts"] == 8


def test_noise_and_order_of_attacks():
    found = run(attacks="noise,pgd-5,apgd-ce")
    rows = {row.attack: row.correct for row in found.report.results}
    assert list(rows) == [None, "noise", "pgd-5", "apgd-ce"]
    assert rows["noise"] >= rows["pgd-5"]
    alone = run(attacks="apgd-ce")
    assert alone.report.get("robust_accuracy").correct == rows["apgd-ce"], "an attack does not depend on its neighbours"


def test_cascade_attacks_only_what_still_stands():
    found = run(attacks="pgd-5,apgd-ce,fab-t", cascade=True)
    rows = {row.attack: row for row in found.report.results}
    assert rows["pgd-5"].correct >= rows["apgd-ce"].correct >= rows["fab-t"].correct
    assert rows["apgd-ce"].attack_parameters["parts"][0]["attacked"] == rows["pgd-5"].correct
    assert rows["fab-t"].attack_parameters["after"] == ["pgd-5", "apgd-ce"]
    assert (~found.verdicts.stands("apgd-ce") | found.verdicts.stands("pgd-5")).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_stays_in_the_ball(norm):
    report = arrest_hub.evaluate(
        robust_net(), patterns(24, 4), attacks="pgd-5", norm=norm, eps={"linf": EPS, "l2": "1.1"}[norm], teacher=None,
        check_images=4,
    )  # fmt: skip
    ball = next(check for check in report.checks if "inside the ball" in check.name)
    assert ball.status == "pass"
    assert ball.value == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("batch_size", "known"), [(7, True), (30, False)])
def test_the_time_of_compilation_is_no_speed(batch_size, known, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda network, **_: network)
    found = run(smooth_net(4), patterns(30, 4, seed=7), batch_size=batch_size, compile=True)
    assert (found.report.images_per_second is not None) == known


def test_channels_last_reaches_the_convolutions():
    net, seen = tiny_backbone(4), set()
    first = next(module for module in net.modules() if isinstance(module, nn.Conv2d))

    def look(module, inputs):
        seen.add(tuple(x.is_contiguous(memory_format=torch.channels_last) for x in (inputs[0], module.weight)))

    first.register_forward_pre_hook(look)
    arrest_hub.evaluate(
        net, patterns(8, 4), channels_last=True, attacks="clean,pgd-2", checks=False, batch_size=8, figures=False
    )
    assert seen == {(True, True)}


def test_channels_last_and_bf16_are_said_and_agree():
    pair = patterns(24, 3, seed=7)
    net = tiny_backbone()
    plain = run(net, pair, eps="40/255")
    other = run(net, pair, eps="40/255", channels_last=True, attacks="pgd-5,apgd-ce,fab-t")
    same = plain.verdicts.stands("pgd-5") == other.verdicts.stands("pgd-5")
    assert same.mean() > 0.9
    half = run(net, pair, eps="40/255", precision="bf16")
    assert half.report.precision == "bf16"
    assert (half.verdicts.prediction == plain.verdicts.prediction).mean() > 0.8


def test_images_may_be_uint8():
    pixels, labels = patterns(24, 4)
    as_bytes = (pixels * 255).round().to(torch.uint8)
    assert np.array_equal(
        run(pair=(as_bytes, labels)).verdicts.stands("pgd-5"), run(pair=(pixels, labels)).verdicts.stands("pgd-5")
    )


@pytest.mark.parametrize(
    ("pixels", "labels", "message"),
    [
        (torch.rand(4, 3, 8, 8) * 255, torch.zeros(4).long(), r"pixels between .* \[0, 1\]"),
        (torch.randn(4, 3, 8, 8), torch.zeros(4).long(), "normalised"),
        (torch.rand(4, 3, 8), torch.zeros(4), "N, C, H, W"),
        (torch.rand(4, 3, 8, 8), torch.zeros(3), "shape"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.int64), torch.zeros(4).long(), "int64"),
        (torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 9]), "label 9 and the model 4 outputs"),
        (torch.rand(4, 3, 8, 8), torch.tensor([0, 1, -1, 2]), "label -1"),
        (torch.rand(4, 3, 8, 8), torch.rand(4), "labels of type"),
        (torch.full((4, 3, 8, 8), float("nan")), torch.arange(4), "not finite"),
    ],
)
def test_bad_images_are_one_clear_error(pixels, labels, message):
    with pytest.raises(ArrestError, match=message):
        run(pair=(pixels, labels))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z: z * float("nan"), "not finite"),
        (lambda z: z[:, :, None], "logits"),
        (lambda z: {"scores": z}, "dict"),
    ],
)
def test_a_bad_model_is_one_clear_error(change, message):
    with pytest.raises(ArrestError, match=message):
        run(LogitsOnly(robust_net(), change))


class NotANumberOffTheGrid(torch.nn.Module):
    """Fine on images as they are stored, NaN on what an attack makes of them."""

    def __init__(self):
        super().__init__()
        self.net = robust_net()

    def forward(self, pixels):
        off = ((pixels * 255 - (pixels * 255).round()).abs() > 1e-3).flatten(1).any(dim=1, keepdim=True)
        return torch.where(off, float("nan"), self.net(pixels))


def test_nan_under_attack_is_no_robustness_and_no_success_either():
    with pytest.raises(ArrestError, match="not finite"):
        run(NotANumberOffTheGrid(), attacks="noise")


def test_images_of_different_sizes_need_an_image_size(tmp_path):
    for split, number in (("train", 6), ("test", 6)):
        for i in range(number):
            path = tmp_path / split / str(i % 2) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8 + i, 8), (40 * i, 90, 20)).save(path)
    options = {"attacks": "noise", "eps": EPS, "checks": False, "teacher": None, "num_workers": 0}
    net = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 2))
    with pytest.raises(ConfigError, match="image_size"):
        arrest_hub.evaluate(net, str(tmp_path), **options)
    assert arrest_hub.evaluate(net, str(tmp_path), image_size=8, **options).results[0].n == 6


def test_a_model_that_wants_normalised_input_is_warned_of():
    """Fed [0, 1], a network trained on normalised pixels is at chance."""
    net = robust_net()
    wants_normalised = LogitsOnly(lambda x: net(x * 0.002 + 0.9))
    report = arrest_hub.evaluate(wants_normalised, patterns(48, 4), attacks="noise", eps=EPS, teacher=None)
    assert "normalise" in next(check.finding for check in report.warnings if "chance" in check.name)


def test_options_are_checked_together():
    with pytest.raises(ConfigError) as caught:
        arrest_hub.evaluate(robust_net(), patterns(4, 4), eps="0", attacks="pgd,autoatack", norm="linf")
    text = str(caught.value)
    assert "--eps 0 is out of range" in text
    assert "pgd-20" in text
    assert "Did you mean 'autoattack'" in text
    with pytest.raises(ConfigError, match="model is a function"):
        arrest_hub.evaluate(lambda x: x, patterns(4, 4))
    with pytest.raises(ConfigError, match="the teacher has 3 outputs and the model 4"):
        arrest_hub.evaluate(robust_net(), patterns(4, 4), teacher=robust_net(3), eps=EPS)
    with pytest.raises(ConfigError, match="the dataset has 10 classes and the model 4"):
        arrest_hub.evaluate(LogitsOnly(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4))), "digits")
    assert [row.attack for row in run(attacks="noise").report.results] == [None, "noise"]
    report = arrest_hub.evaluate(
        robust_net(), patterns(8, 4), attacks=["clean", "noise"], eps=EPS, checks=False, teacher=None
    )  # fmt: skip
    assert [row.attack for row in report.results] == [None, "noise"]
    with pytest.raises(ConfigError, match="no option 'steps'"):
        arrest_hub.evaluate(robust_net(), patterns(4, 4), steps=3)
    with pytest.raises(ConfigError, match="at least 4 classes"):
        run(robust_net(3), patterns(6, 3), attacks="apgd-t")


# -- the command line and its record


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("eval")
    write_images(root / "data")
    write_model(root / "model")
    return root


def arguments(folder, out, *more):
    return [str(folder / "model"), "--dataset", str(folder / "data"), "--eps", "40/255", "--attacks", "pgd-5,apgd-ce",
            "--batch-size", "8", "--num-workers", "0", "--output-dir", str(out), *more]  # fmt: skip


def test_the_record(folder, tmp_path):
    out = tmp_path / "out"
    more = [
        "--eps-curve",
        "0:40/255:3",
        "--teacher",
        str(folder / "model"),
        "--limit-eval",
        "18",
        "--check-images",
        "6",
    ]
    eval_command(arguments(folder, out, *more))
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files == {
        ".lock", "eval_config.yaml", "results.json", "verdicts.parquet",
        *(f"figures/{name}.png" for name in ("eps_curve", "per_class", "gallery", "drift")),
    }  # fmt: skip
    report, verdicts = read_results(out / "results.json"), read_verdicts(out / "verdicts.parquet")
    # every figure can be counted again from the verdicts
    for row in report.results:
        right = verdicts.clean_correct if row.attack is None else verdicts.stands(row.attack)
        assert (row.correct, row.n) == (int(right.sum()), 18)
    assert set(verdicts.broken_by) == {"pgd-5", "apgd-ce"}
    assert verdicts.index.max() > 17, "rows of the split on disk, not places in the selection"
    assert [point.eps for point in report.eps_curve["student"]] == ["0", "20/255", "40/255"]
    curve = [point.correct for point in report.eps_curve["student"]]
    assert curve == sorted(curve, reverse=True)
    assert report.eps_curve["student"][0].correct == report.get("clean_accuracy").correct
    assert report.preprocessing["size"] == [8, 8]
    assert {"torch", "pyautoattack", "timm"} <= set(report.versions)
    assert [row.attack for row in report.teacher_results] == [None, "pgd-5"]
    assert report.model["parameters"] > 0
    assert len(report.model["weights_sha256"]) == 64


def test_what_is_there_is_not_overwritten(folder, tmp_path, capsys):
    out = tmp_path / "out"
    quick = arguments(folder, out, "--no-checks", "--no-figures", "--limit-eval", "12")
    assert run_cli(eval_command, quick) == 0
    before = (out / "results.json").read_bytes()
    assert run_cli(eval_command, quick) == 2
    assert "already holds an evaluation" in capsys.readouterr().err
    assert run_cli(eval_command, [*quick, "--resume"]) == 0
    assert "nothing is left" in capsys.readouterr().out
    assert run_cli(eval_command, [*quick, "--resume", "--seed", "4"]) == 2
    assert "--seed is 4 but the evaluation to resume has 0" in capsys.readouterr().err
    assert (out / "results.json").read_bytes() == before
    assert run_cli(eval_command, [*quick, "--overwrite", "--seed", "4"]) == 0
    assert read_results(out / "results.json").results[0].seed == 4
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    quick[quick.index(str(out))] = str(tmp_path / "mine")
    assert run_cli(eval_command, [*quick, "--overwrite"]) == 2
    assert "is not an evaluation" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_two_evaluations_in_one_folder(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_folder, "LOCK_SECONDS", 0.2)
    out = tmp_path / "out"
    quick = arguments(folder, out, "--no-checks", "--no-figures", "--limit-eval", "12")
    assert run_cli(eval_command, quick) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with FileLock(out / ".lock"):
        assert run_cli(eval_command, [*quick, "--overwrite"]) == 2
    assert "in use by another run" in capsys.readouterr().err
    monkeypatch.setattr("arrest_hub.evaluation.folder_problems", lambda config, paths: [])  # as before the loading
    assert run_cli(eval_command, quick) == 2
    assert "already holds an evaluation" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_what_a_kill_leaves_of_the_journals_is_removed(folder, tmp_path):
    out = tmp_path / "out"
    quick = arguments(folder, out, "--no-checks", "--no-figures", "--limit-eval", "12")
    assert run_cli(eval_command, quick) == 0
    (out / "progress").mkdir()
    (out / "progress" / "rank-00000.jsonl").write_text("{}\n")
    assert run_cli(eval_command, [*quick, "--resume"]) == 0
    assert not (out / "progress").exists()


def test_other_weights_cannot_go_on_with_a_journal(folder, tmp_path, capsys):
    out = tmp_path / "out"
    quick = arguments(folder, out, "--no-checks", "--no-figures", "--limit-eval", "12")
    write_model(tmp_path / "model", NAMES)
    quick[0] = str(tmp_path / "model")
    assert run_cli(eval_command, quick) == 0
    backbone = tiny_backbone()
    from arrest_hub.export import write_model_folder

    backbone.label_names = NAMES
    write_model_folder(backbone, tmp_path / "model")
    assert run_cli(eval_command, [*quick, "--resume"]) == 2
    assert "other weights" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(folder, tmp_path):
    options = ["--no-figures", "--attacks", "pgd-20,apgd-ce", "--no-checks", "--eps", "40/255"]
    eval_command([*arguments(folder, tmp_path / "whole"), *options])
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "arrest_hub", "eval", *arguments(folder, out), *options]
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parent.parent), OMP_NUM_THREADS="1")
    journal, lines_before = out / "progress" / "rank-00000.jsonl", []
    for wanted in (9, 16):  # killed twice: in an early stage, then in a later one
        more = ["--resume"] if lines_before else []
        process = subprocess.Popen([*command, *more], env=environment, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if journal.exists() and len(journal.read_text().splitlines()) >= wanted:
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it finished before it could be killed"
        lines_before.append(len(journal.read_text().splitlines()))
    assert not (out / "results.json").exists()
    assert lines_before[1] >= lines_before[0] >= 9
    with journal.open("a") as file:
        file.write('{"stage": "pgd-20", "batch": 1, "bro')  # what a kill in mid-write leaves
    eval_command([*arguments(folder, out), *options, "--resume"])
    assert not (out / "progress").exists()
    whole, resumed = (read_verdicts(path / "verdicts.parquet") for path in (tmp_path / "whole", out))
    for attack, column in whole.broken_by.items():
        assert column.tolist() == resumed.broken_by[attack].tolist()
    reports = [read_results(path / "results.json") for path in (tmp_path / "whole", out)]
    assert [row.correct for row in reports[0].results] == [row.correct for row in reports[1].results]
    assert [check.value for check in reports[0].checks] == [check.value for check in reports[1].checks]
    assert 0 < reports[0].get("robust_accuracy", attack="apgd-ce").correct < 48


def test_several_models_are_compared(folder, tmp_path, capsys):
    write_model(tmp_path / "other")
    backbone = tiny_backbone()
    backbone.label_names = NAMES
    from arrest_hub.export import write_model_folder

    write_model_folder(backbone, tmp_path / "untrained")
    out = tmp_path / "both"
    argv = arguments(folder, out, "--no-checks", "--no-figures", "--limit-eval", "12")
    assert run_cli(eval_command, [argv[0], str(tmp_path / "missing"), *argv[1:]]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert not out.exists(), "said before the first one is evaluated"
    write_model(tmp_path / "reversed", NAMES[::-1])
    (shutil.copytree(tmp_path / "other", tmp_path / "damaged") / "model.safetensors").write_bytes(b"")
    for wrong, said in (("reversed", "in another order"), ("damaged", "files are damaged")):
        assert run_cli(eval_command, [argv[0], str(tmp_path / wrong), *argv[1:]]) == 2
        error = capsys.readouterr().err
        assert f"{tmp_path / wrong}: " in error, "which of the models it is"
        assert said in error
        assert not out.exists()
    eval_command([argv[0], str(tmp_path / "untrained"), *argv[1:]])
    data = json.loads((out / "comparison.json").read_text())
    assert [entry["model"] for entry in data["models"]] == ["model", "untrained"]
    assert data["pairs"][0]["only_first"] > 0
    assert "| model |" in (out / "comparison.md").read_text()
    assert "harmonic mean" in capsys.readouterr().out
    assert (out / "model" / "results.json").exists()
    before = (out / "comparison.json").read_bytes()
    write_model(tmp_path / "third")
    others = [str(tmp_path / "other"), str(tmp_path / "third"), *argv[1:]]
    assert run_cli(eval_command, others) == 2
    assert "comparison.json is there already" in capsys.readouterr().err
    assert (out / "comparison.json").read_bytes() == before
    eval_command([*others, "--overwrite"])
    assert (out / "comparison.json").read_bytes() != before
    namesake = shutil.copytree(folder / "model", tmp_path / "else" / "model")
    eval_command([argv[0], str(namesake), *argv[1:], "--output-dir", str(tmp_path / "namesakes")])
    data = json.loads((tmp_path / "namesakes" / "comparison.json").read_text())
    assert [entry["model"] for entry in data["models"]] == [f"model ({argv[0]})", f"model-2 ({namesake})"]
    alone = arguments(folder, tmp_path / "alone", "--no-checks", "--no-figures", "--limit-eval", "12")
    assert run_cli(eval_command, alone) == 0
    capsys.readouterr()
    assert run_cli(eval_command, [alone[0], str(namesake), *alone[1:], "--resume"]) == 2
    assert "alone holds the evaluation of one model, not of several" in capsys.readouterr().err


def test_an_export_is_brought_up_to_date(tmp_path, capsys):
    """What arrest-eval finds goes into the folder that arrest-finetune wrote, its card included."""
    write_images(tmp_path / "data", count=24)
    run = finetune(tiny_config(tmp_path, max_steps=2, epochs=1, eps="40/255", validation_size=8, eval_attack_steps=3))
    export = run.export
    again = [str(export), "--dataset", str(tmp_path / "data"), "--eps", "40/255", "--batch-size", "8", "--num-workers",
             "0", "--teacher", str(tmp_path / "model"), "--check-images", "4"]  # fmt: skip
    before = read_results(export / "results.json")
    eval_command([*again, "--attacks", "pgd-3", "--no-checks", "--no-figures", "--output-dir", str(tmp_path / "same")])
    same = read_results(tmp_path / "same" / "results.json")
    assert [row.correct for row in same.results] == [row.correct for row in before.results], "one way to measure"
    assert [row.correct for row in same.teacher_results] == [row.correct for row in before.teacher_results]
    more = [*again, "--attacks", "apgd-ce", "--eps-curve", "0:40/255:3", "--curve-images", "6"]
    eval_command([*more, "--output-dir", str(tmp_path / "more")])
    after = read_results(export / "results.json")
    assert [row.attack for row in after.results] == [None, "pgd-3", "apgd-ce"]
    assert after.model["steps"] == 2, "what the run knew is kept"
    assert set(read_verdicts(export / "verdicts.parquet").broken_by) == {"pgd-3", "apgd-ce"}
    card = (export / "README.md").read_text()
    assert "APGD-CE" in card
    assert "PGD-3" in card
    assert "figures/eps_curve.png" in card
    assert "share of zero gradients" in card
    assert str(tmp_path) not in card.split("## Training")[0]
    assert str(tmp_path) not in (export / "results.json").read_text(), "no path of this machine is published"
    assert str(tmp_path).encode() not in (export / "verdicts.parquet").read_bytes()

    plain = ["--no-checks", "--no-figures"]
    (export / "README.md").write_text(card + "\nMy own words.\n")
    capsys.readouterr()
    eval_command([*again, "--attacks", "noise", "--output-dir", str(tmp_path / "third"), *plain, "--seed", "1"])
    assert "README.md was edited" in capsys.readouterr().out
    assert (export / "README.md").read_text().endswith("My own words.\n")
    kept = (export / "results.json").read_bytes()
    eval_command(
        [
            *again,
            "--attacks",
            "noise",
            "--output-dir",
            str(tmp_path / "fourth"),
            *plain,
            "--no-update-export",
            "--seed",
            "2",
        ]
    )
    assert (export / "results.json").read_bytes() == kept
    fourth = [*again, "--attacks", "noise", "--output-dir", str(tmp_path / "fourth"), *plain, "--seed", "2"]
    eval_command([*fourth, "--resume"])
    assert "brought up to date" in capsys.readouterr().out, "a finished evaluation can be put there afterwards"
    assert read_results(export / "results.json").get("robust_accuracy", attack="noise").seed == 2


def made_up_report(
    n=48, split="test", norm="linf", eps="40/255", precision="fp32", size=(8, 8), weights="w", attacks=("pgd-20",)
):
    place = {"n": n, "dataset": "data", "split": split, "seed": 0, "seconds": 1.0}
    rows = [Result("clean_accuracy", None, None, None, 10, **place)]
    rows += [Result("robust_accuracy", name, norm, eps, 5, **place) for name in attacks]
    model = {"weights_sha256": weights, "library": "timm", "architecture": "x", "steps": 1, "parameters": 9}
    return EvalReport(rows, precision=precision, preprocessing={"size": list(size)}, model=model)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"precision": "bf16"}, "precision fp32 there, bf16 here"),
        ({"precision": "fp32, channels_last"}, "fp32, channels_last here"),
        ({"n": 12, "split": "test[12]"}, "images 48 of data [test] there, 12 of data [test[12]] here"),
        ({"norm": "l2", "eps": "1"}, "threat linf 40/255 there, l2 1 here"),
        ({"size": [10, 10]}, "size [8, 8] there, [10, 10] here"),
        ({"weights": "other"}, "of other weights"),
        ({"cascade": True}, "of a cascade"),
    ],
)
def test_figures_that_would_not_stand_together_stay_off_the_card(tmp_path, change, said):
    (tmp_path / "training_config.yaml").write_text(FinetuneConfig(model="m", dataset="d").to_yaml())
    (tmp_path / "config.json").write_text('{"num_classes": 3}')
    made_up_report().write(tmp_path / "results.json")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    config = EvalConfig(model=str(tmp_path), dataset="data", cascade=change.pop("cascade", False))
    verdicts = Verdicts(np.arange(2), np.zeros(2, int), np.zeros(2, int))
    (sentence,) = update_export(config, made_up_report(**change), verdicts, [])
    assert "left as it is" in sentence
    assert said in sentence
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert (
        "brought up to date"
        in update_export(EvalConfig(model=str(tmp_path), dataset="data"), made_up_report(), verdicts, [])[0]
    )


def test_figures_of_fewer_images_give_way_to_the_same_of_more(tmp_path):
    """A quick evaluation at the end of a training does not keep the whole one off the card."""
    (tmp_path / "training_config.yaml").write_text(FinetuneConfig(model="m", dataset="d").to_yaml())
    (tmp_path / "config.json").write_text('{"num_classes": 3}')
    (tmp_path / "figures").mkdir()
    for name in ("gallery.png", "training.png"):
        (tmp_path / "figures" / name).write_bytes(b"old")
    few = made_up_report(n=12, split="test[12]")
    few.write(tmp_path / "results.json")
    Verdicts(np.arange(12), np.zeros(12, int), np.zeros(12, int), {"pgd-20": np.full(12, None)}).write(
        tmp_path / "verdicts.parquet"
    )
    verdicts = Verdicts(np.arange(48), np.zeros(48, int), np.zeros(48, int), {"pgd-20": np.full(48, None)})
    config = EvalConfig(model=str(tmp_path), dataset="data")

    (sentence,) = update_export(config, made_up_report(attacks=("autoattack",), precision="bf16"), verdicts, [])
    assert "left as it is" in sentence, "it has no PGD figure to put in the earlier one's place"
    for change in ({"split": "train"}, {"precision": "bf16"}, {"size": (10, 10)}, {"eps": "20/255"}):
        (sentence,) = update_export(config, made_up_report(**change), verdicts, [])
        assert "left as it is" in sentence, f"more images, but {change} is no better answer to the same question"
    (sentence,) = update_export(config, made_up_report(attacks=("pgd-20", "autoattack")), verdicts, [])
    assert "brought up to date" in sentence
    report = read_results(tmp_path / "results.json")
    assert [(row.attack, row.n) for row in report.results] == [(None, 48), ("pgd-20", 48), ("autoattack", 48)]
    assert len(read_verdicts(tmp_path / "verdicts.parquet")) == 48
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["training.png"]
    assert "48 images" in (tmp_path / "README.md").read_text()


@pytest.fixture
def export(tmp_path):
    """The least that `update_export` takes for a folder of arrest-finetune's."""
    (tmp_path / "training_config.yaml").write_text(FinetuneConfig(model="m", dataset="d").to_yaml())
    (tmp_path / "config.json").write_text('{"num_classes": 3}')
    return tmp_path


def made_up_verdicts(prediction, **broken_by):
    columns = {name.replace("_", "-"): np.array(column, dtype=object) for name, column in broken_by.items()}
    return Verdicts(np.arange(len(prediction)), np.zeros(len(prediction), int), np.array(prediction), columns)


def test_a_stream_counted_other_images(export):
    """Those held out of a stream, or taken from it, are not those of the same number drawn from the whole split."""
    config = EvalConfig(model=str(export), dataset="data")
    for split, said in (("test[12]", "or streamed"), ("train[held-out test]", "or streamed"), ("test", "up to date")):
        made_up_report(n=12, split=split).write(export / "results.json")
        verdicts = made_up_verdicts([0] * 12, pgd_20=[None] * 12)
        (sentence,) = update_export(config, made_up_report(n=12, split=split, attacks=("noise",)), verdicts, [])
        assert said in sentence
        attacks = [row.attack for row in read_results(export / "results.json").results]
        assert attacks == [None, *(["noise"] if split == "test" else []), "pgd-20"]


def test_every_figure_can_be_counted_again_where_a_clean_prediction_changed(export):
    """On another device that happens; the columns of earlier attacks stay with their figures."""
    made_up_report(n=40, attacks=("pgd-20",)).write(export / "results.json")
    made_up_verdicts([0, 0, 0, 1], pgd_20=[None, "pgd-20", None, "clean"]).write(export / "verdicts.parquet")
    config = EvalConfig(model=str(export), dataset="data")
    new = made_up_verdicts([0, 0, 1, 0], noise=[None, None, "clean", "noise"])
    update_export(config, made_up_report(n=40, attacks=("noise",)), new, [])
    assert {row.attack for row in read_results(export / "results.json").results} == {None, "pgd-20", "noise"}
    kept = read_verdicts(export / "verdicts.parquet")
    assert kept.stands("pgd-20").tolist() == [True, False, True, False]
    assert kept.stands("noise").tolist() == [True, True, False, False]
    assert kept.clean_correct.tolist() == [True, True, False, True]


def test_accuracy_by_class_is_drawn_of_the_strongest_attack(export, tmp_path):
    """As its caption says, whatever is measured later and in which order."""
    config = EvalConfig(model=str(export), dataset="data")
    drawn = tmp_path / "drawn"
    drawn.mkdir()
    kept = export / "figures" / "per_class.png"

    def update(attack, correct, *, figures=True):
        report = made_up_report(n=40, attacks=(attack,))
        report.results[1] = dataclasses.replace(report.results[1], correct=correct)
        if not (export / "results.json").exists():
            report.write(export / "results.json")
        for name in ("per_class.png", "gallery.png"):
            (drawn / name).write_text(attack)
        update_export(config, report, made_up_verdicts([0] * 4), sorted(drawn.iterdir()) if figures else [])
        return kept.read_text() if kept.exists() else None

    assert update("pgd-20", 2) == "pgd-20"
    assert update("noise", 4) == "pgd-20"
    assert (export / "figures" / "gallery.png").read_text() == "noise"
    assert update("apgd-ce", 1) == "apgd-ce"
    assert update("pgd-20", 2) == "apgd-ce"
    assert update("apgd-t", 0, figures=False) is None, "no picture is better than that of another attack"
    assert update("autoattack", 1) is None
    assert update("autoattack", 0) == "autoattack"


def test_clean_accuracy_alone_brings_nothing_of_another_threat_model(export, tmp_path):
    """Its checks, curve and pictures are of the radius that the flags have, which may be nothing but the default."""
    (export / "figures").mkdir()
    (export / "figures" / "gallery.png").write_text("l2")
    before = made_up_report(norm="l2", eps="0.5")
    before.checks = [Check(CHANCE, "pass", 0.8, "80 %."), Check("noise", "warn", 0.5, "masked")]
    before.eps_curve = {"student": [CurvePoint("0.5", 1, 2)]}
    before.write(export / "results.json")
    clean = made_up_report(attacks=())
    clean.checks = [Check(CHANCE, "pass", 0.9, "90 %."), Check("noise", "pass", 0.0, "fine")]
    clean.eps_curve = {"student": [CurvePoint("8/255", 2, 2)]}
    (tmp_path / "gallery.png").write_text("linf")
    drawn = [tmp_path / "gallery.png"]

    def update(**threat):
        config = EvalConfig(model=str(export), dataset="data", attacks="clean", **threat)
        (sentence,) = update_export(config, clean, made_up_verdicts([0] * 4), drawn)
        assert "brought up to date" in sentence
        return sentence, read_results(export / "results.json"), (export / "figures" / "gallery.png").read_text()

    sentence, after, picture = update()
    assert "another threat model, linf 8/255" in sentence
    assert [check.status for check in after.checks] == ["pass", "warn"]
    assert after.checks[0].value == 0.9
    assert (after.eps_curve, picture) == (before.eps_curve, "l2")
    sentence, after, picture = update(norm="l2", eps="1/2")
    assert "threat" not in sentence
    assert [check.status for check in after.checks] == ["pass", "pass"]
    assert (after.eps_curve, picture) == (clean.eps_curve, "linf")


def test_the_same_radius_in_other_words_is_the_same(export):
    made_up_report(norm="l2", eps="0.5").write(export / "results.json")
    config = EvalConfig(model=str(export), dataset="data", norm="l2", eps="1/2")
    again = made_up_report(norm="l2", eps="1/2", attacks=("pgd-20", "noise"))
    assert "up to date" in update_export(config, again, made_up_verdicts([0] * 4), [])[0]
    rows = read_results(export / "results.json").results
    assert [(row.attack, row.eps) for row in rows] == [(None, None), ("noise", "1/2"), ("pgd-20", "1/2")]


def test_a_weaker_attack_of_the_same_name_takes_no_figure_away(export):
    """A robust accuracy is at most what any attack leaves."""
    config = EvalConfig(model=str(export), dataset="data")

    def update(correct, attacks=("pgd-20",), **parameters):
        report = made_up_report(n=40, attacks=attacks)
        report.results[1] = dataclasses.replace(report.results[1], correct=correct, attack_parameters=parameters)
        if not (export / "results.json").exists():
            report.write(export / "results.json")
        verdicts = made_up_verdicts([0] * 4, **{name.replace("-", "_"): [str(correct)] * 4 for name in attacks})
        (sentence,) = update_export(config, report, verdicts, [])
        return sentence, read_results(export / "results.json").get("robust_accuracy", attack="pgd-20").correct

    assert update(20, restarts=4, step_size=0.01)[1] == 20
    sentence, kept = update(30, ("pgd-20", "noise"), restarts=4, step_size=0.0001)
    assert kept == 20
    assert "without PGD-20 with 4 restarts and steps of 0.0001, which leaves 75.0 %" in sentence
    assert "since that with 4 restarts and steps of 0.01 leaves 50.0 %" in sentence
    rows = read_results(export / "results.json").results
    assert [row.attack for row in rows] == [None, "noise", "pgd-20"], "the rest is taken up"
    columns = read_verdicts(export / "verdicts.parquet").broken_by
    assert {name: column[0] for name, column in columns.items()} == {"pgd-20": "20", "noise": "30"}
    assert update(19, restarts=1, step_size=0.02)[1] == 19, "it found more"
    assert update(21, restarts=1, step_size=0.02)[1] == 21, "the same attack, measured again"


def test_a_new_curve_takes_the_picture_of_the_old_one_away(export):
    (export / "figures").mkdir()
    for name in ("eps_curve.png", "gallery.png"):
        (export / "figures" / name).write_text("old")
    made_up_report().write(export / "results.json")
    new = made_up_report()
    new.eps_curve = {"student": [CurvePoint("8/255", 2, 2)]}
    config = EvalConfig(model=str(export), dataset="data", eps="40/255")
    update_export(config, new, made_up_verdicts([0] * 4), [])
    assert [path.name for path in (export / "figures").iterdir()] == ["gallery.png"]


def test_checks_against_another_teacher_stay_off_the_card(export):
    before = made_up_report()
    before.model["teacher_sha256"] = "t"
    before.checks = [Check(TRANSFER, "warn", 0.5, "hurt more")]
    before.write(export / "results.json")
    new = made_up_report()
    new.teacher_results = new.results
    new.model["teacher_sha256"] = "other"
    new.checks = [Check(TRANSFER, "pass", 0.0, "fine")]
    config = EvalConfig(model=str(export), dataset="data", teacher="other", eps="40/255")
    update_export(config, new, made_up_verdicts([0] * 4), [])
    assert read_results(export / "results.json").checks == before.checks


def test_a_machine_that_cannot_compile_says_so_at_once(folder, tmp_path, capsys, monkeypatch):
    def cannot(*_, **__):
        raise RuntimeError("no C++ compiler\nat all")

    monkeypatch.setattr(torch, "compile", cannot)
    assert run_cli(eval_command, arguments(folder, tmp_path / "out", "--compile")) == 2
    said = capsys.readouterr().err
    assert "error: --compile: this machine cannot compile (no C++ compiler at all)" in said
    with pytest.raises(ConfigError, match="cannot compile"):
        finetune(tiny_config(tmp_path, compile=True))


def test_robustbench_entry_is_refused_before_the_work(folder, tmp_path, capsys):
    argv = arguments(folder, tmp_path / "out", "--robustbench-json", str(tmp_path / "entry.json"))
    assert run_cli(eval_command, argv) == 2
    assert "RobustBench" in capsys.readouterr().err
    with pytest.raises(ConfigError) as caught:
        run_evaluation(
            EvalConfig(model="m", dataset="cifar10", attacks=" PGD-20, AutoAttack", robustbench_json=str(tmp_path))
        )
    assert caught.value.problems == [f"--robustbench-json {tmp_path} is a folder: give the name of a file."]
    (tmp_path / "file").touch()
    entry = str(tmp_path / "file" / "entry.json")
    with pytest.raises(ConfigError, match=r"entry\.json cannot be written"):
        run_evaluation(EvalConfig(model="m", dataset="cifar10", attacks="pgd-20,autoattack", robustbench_json=entry))
    parse_eval(["m", "--dataset", "cifar10", "--attacks", " PGD-20, AutoAttack", "--robustbench-json", "entry.json"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--eps", "0"], "--eps 0 is out of range"),
        (["--eps", "8"], "Did you mean 8/255"),
        (["--attacks", "pgd20"], "pgd-20"),
        (["--attacks", "pgd-0"], "no step at all"),
        (["--attacks", ""], "--attacks is empty"),
        (["--eps", "-1/255"], "does not begin with a hyphen"),
        (["--attack", "pgd-20"], "Did you mean '--attacks'"),
        (["--norm", "l1", "--attacks", "pgd-20"], "For l1 give autoattack"),
        (["--eps-curve", "0:8/255"], "0:16/255:9"),
        (["--dataset", "nowhere/here/x"], "does not exist"),
        (["--teacher", "none-such/thing/x"], "none-such"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--precision", "tf32"], "tf32 needs an NVIDIA GPU"),
        (["--attack-precision", "tf32"], "--attack-precision tf32 needs an NVIDIA GPU"),
    ],
)
def test_bad_flags_are_one_clear_error_and_write_nothing(folder, tmp_path, capsys, change, message):
    if "tf32" in change and torch.cuda.is_available():
        pytest.skip("this machine has TF32")
    argv = arguments(folder, tmp_path / "out")
    for name, value in zip(change[::2], change[1::2], strict=True):
        if name in argv:
            argv[argv.index(name) + 1] = value
        else:
            argv += [name, value]
    assert run_cli(eval_command, argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out" / "results.json").exists()


def test_classes_that_do_not_fit(folder, tmp_path, capsys):
    write_model(tmp_path / "model", [*NAMES, "more"])
    argv = arguments(folder, tmp_path / "out")
    argv[0] = str(tmp_path / "model")
    assert run_cli(eval_command, argv) == 2
    error = capsys.readouterr().err
    assert "3 classes and the model 4 outputs" in error
    assert "standard-epochs" not in error, "no head is trained here"
    write_model(tmp_path / "renamed", NAMES[::-1])
    argv[0] = str(tmp_path / "renamed")
    assert run_cli(eval_command, argv) == 2
    assert "--label-match name" in capsys.readouterr().err
    quick = [*argv, "--no-checks", "--no-figures", "--attacks", "clean"]
    assert run_cli(eval_command, [*quick, "--label-match", "name"]) == 0


def test_frozen_eval_is_left_after_an_error():
    net = robust_net().train()
    with pytest.raises(ArrestError):
        run(net, (torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 9])))
    assert net.training
    with frozen_eval(net):
        pass


def test_model_and_teacher_are_left_as_they_were():
    """Given in training mode, neither BatchNorm's statistics nor any gradient is touched."""
    model, teacher = TinyClassifier().train(), TinyClassifier(seed=1).train()
    before = [copy.deepcopy(net.state_dict()) for net in (model, teacher)]
    arrest_hub.evaluate(
        model, patterns(12, 3), teacher=teacher, attacks="pgd-2,apgd-ce", eps=EPS, eps_curve="0:8/255:2"
    )
    for net, state in zip((model, teacher), before, strict=True):
        assert net.training
        assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
        assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())


def test_overwriting_leaves_what_is_not_of_this_evaluation(folder, tmp_path):
    quick = [str(folder / "model"), "--dataset", str(folder / "data"), "--attacks", "noise", "--num-workers", "0",
             "--no-checks", "--teacher", "none", "--limit-eval", "6"]  # fmt: skip
    for out in ("evals", "evals/other"):
        eval_command([*quick, "--output-dir", str(tmp_path / out)])
    (tmp_path / "evals" / "notes.txt").write_text("mine")
    (tmp_path / "evals" / "figures" / "mine.png").write_text("mine")
    eval_command([*quick, "--no-figures", "--overwrite", "--seed", "3", "--output-dir", str(tmp_path / "evals")])
    left = {path.relative_to(tmp_path / "evals").as_posix() for path in (tmp_path / "evals").rglob("*")}
    own = {".lock", "eval_config.yaml", "results.json", "verdicts.parquet"}
    assert {path for path in left if "other/" not in path} == {
        *own,
        "notes.txt",
        "figures",
        "figures/mine.png",
        "other",
    }
    assert {f"other/{name}" for name in own} < left
    assert read_results(tmp_path / "evals" / "results.json").results[0].seed == 3


def test_the_cards_teacher_is_the_network_that_was_finetuned(tmp_path, capsys, monkeypatch):
    """Another one that --teacher names is compared with, and does not take its place; a home may be written as ~."""
    export = finetune(tiny_config(tmp_path, max_steps=1)).export
    other = tiny_backbone(3)
    other.label_names = NAMES
    write_model_folder(other, tmp_path / "other")
    before = read_results(export / "results.json")
    monkeypatch.setenv("HOME", str(tmp_path))
    config = EvalConfig(
        model="~/run/export", dataset=str(tmp_path / "data"), teacher=str(tmp_path / "other"), attacks="noise",
        output_dir=str(tmp_path / "first"), checks=False, figures=False, num_workers=0, eps_curve="0:8/255:2",
    )  # fmt: skip
    found = run_evaluation(config).report
    assert "without figures of" in capsys.readouterr().out
    after = read_results(export / "results.json")
    assert [row.attack for row in after.results] == [None, "noise", "pgd-1"]
    assert after.teacher_results == before.teacher_results
    assert after.model == before.model | {key: after.model[key] for key in after.model.keys() - before.model.keys()}
    assert set(after.eps_curve) == {"student"}
    assert found.teacher_results, "in the record they are"
    config = dataclasses.replace(config, teacher=str(tmp_path / "model"), output_dir=str(tmp_path / "second"))
    run_evaluation(config)
    last = read_results(export / "results.json")
    assert [row.attack for row in last.teacher_results] == [None, "noise", "pgd-1"]
    assert set(last.eps_curve) == {"student", "teacher"}


@pytest.mark.parametrize("text", ["trainer:\n  epochs: 3\n", "- a\n- b\n", "!!python/none x: [", "model: mine\n"])
def test_a_config_that_is_somebody_elses_names_no_teacher(text, tmp_path, monkeypatch):
    for name in ("export", "robust"):
        model = write_model(tmp_path / name / name)
        (model / RECORD).write_text("{}")
        (tmp_path / name / "config.yaml").write_text(text)
        monkeypatch.chdir(model)
        subject = SimpleNamespace(backbone=load_backbone("."))
        if (text, name) == ("model: mine\n", "export"):  # a folder that is gone, and nothing on the Hub
            with pytest.raises(BackboneError, match="finetuned from, mine, is not there"):
                find_teacher(subject)
            write_model(tmp_path / "net")
            (tmp_path / name / "config.yaml").write_text(f"model: {tmp_path / 'net'}\n")
            assert find_teacher(subject) == str(tmp_path / "net")
        else:
            assert find_teacher(subject) is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_on_whatever_the_caller_has(mode):
    net, pair = robust_net(), patterns(48, 4, seed=7)
    expected = arrest_hub.evaluate(net, pair, attacks="clean,pgd-3", batch_size=16, num_workers=0)
    with mode():
        found = arrest_hub.evaluate(net, pair, attacks="clean,pgd-3", batch_size=16, num_workers=0)
    assert [row.correct for row in found.results] == [row.correct for row in expected.results]


def test_a_network_of_ours_goes_by_its_architecture(tmp_path, capsys):
    backbone = load_backbone(str(write_model(tmp_path / "net")))
    pair = patterns(8, backbone.num_classes)
    for network in (backbone, PretrainedClassifier(backbone)):
        report = arrest_hub.evaluate(network, pair, attacks="clean", checks=False, figures=False)
        assert report.model["architecture"] == report.model["id"] == "resnet18_cifar"
        assert report.model["library"] == "timm"
        out = capsys.readouterr().out
        assert "model       resnet18_cifar (resnet18_cifar, " in out
        assert "checks:" not in out, "none was asked for"


def test_a_float64_network_is_refused():
    with pytest.raises(ConfigError, match=r"float64.*model\.float\(\)"):
        arrest_hub.evaluate(robust_net().double(), patterns(8, 4, seed=7), attacks="clean")


@pytest.mark.parametrize("content", [b"lr: !Param 0.1", b"\xff\xfe", b"- a\n"])
def test_a_training_configuration_that_is_somebody_elses_spoils_nothing(content, folder, tmp_path):
    model = write_model(tmp_path / "model")
    (model / "training_config.yaml").write_bytes(content)
    config = EvalConfig(
        model=str(model), dataset=str(folder / "data"), attacks="noise", teacher="none", limit_eval=6, num_workers=0,
        output_dir=str(tmp_path / "out"), checks=False, figures=False,
    )  # fmt: skip
    run_evaluation(config)
    assert (tmp_path / "out" / "results.json").is_file()


def test_a_damaged_record_is_one_clear_error(folder, tmp_path, capsys):
    out = tmp_path / "out"
    quick = [str(folder / "model"), "--dataset", str(folder / "data"), "--attacks", "noise", "--num-workers", "0",
             "--no-checks", "--no-figures", "--teacher", "none", "--limit-eval", "6"]  # fmt: skip
    assert run_cli(eval_command, [*quick, "--output-dir", str(out), "--resume"]) == 0
    assert "starting from the beginning" in capsys.readouterr().out
    for name, content in (("verdicts.parquet", None), ("results.json", b"{"), ("eval_config.yaml", b"a: [")):
        path, kept = out / name, (out / name).read_bytes()
        path.write_bytes(content) if content else path.unlink()
        assert run_cli(eval_command, [*quick, "--output-dir", str(out), "--resume"]) == 2
        error = capsys.readouterr().err
        assert "error: cannot resume: " in error
        assert "damaged" in error
        assert "--overwrite" in error
        path.write_bytes(kept)
    assert run_cli(eval_command, [*quick, "--output-dir", "/proc/no/such"]) == 2
    assert "--output-dir /proc/no/such cannot be made" in capsys.readouterr().err
    with pytest.raises(ArrestError, match="--output-dir /proc/no/such cannot be made"):
        finetune(tiny_config(tmp_path, output_dir="/proc/no/such"))


class Detached(torch.nn.Module):
    """A network whose logits know nothing of the pixels' gradient."""

    def forward(self, pixels):
        return robust_net()(pixels).detach()


class InPlace(torch.nn.Module):
    """A network that normalises the tensor that it is given."""

    def __init__(self):
        super().__init__()
        self.net = robust_net()

    def forward(self, pixels):
        pixels -= 0.0
        pixels *= 0.5
        return self.net(pixels)


def test_what_is_no_picture_is_one_clear_error(folder):
    model = arrest_hub.load(folder / "model")
    image = Image.new("RGB", (9, 9))
    for wrong in ("x.png", np.zeros((8, 8, 3), np.uint8), [image, image]):
        with pytest.raises(BackboneError, match="give one PIL image"):
            model.classify(wrong)
    for wrong in ("x.png", Path("x.png"), None, [image, np.zeros((8, 8, 3), np.uint8)]):
        with pytest.raises(BackboneError, match="is no PIL image"):
            model.preprocess(wrong)
    with pytest.raises(BackboneError, match="no images"):
        model.preprocess([])
    assert len(model.preprocess([image, image])) == 2

    class Pictures:
        def __getitem__(self, index):
            return [image, image][index]

    assert len(model.preprocess(Pictures())) == 2

    def broken():
        yield image
        raise TypeError("of the caller's own")

    with pytest.raises(TypeError, match="of the caller's own"):
        model.preprocess(broken())


def test_a_model_in_training_classifies_as_it_does_in_eval_mode(folder):
    model = arrest_hub.load(folder / "model")
    image = Image.new("RGB", (9, 9), (200, 10, 10))
    expected = model.classify(image)
    before = {name: value.clone() for name, value in model.train().state_dict().items()}
    assert model.classify(image) == expected
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_can_be_saved_whole(folder, tmp_path):
    model = arrest_hub.load(folder / "model")
    torch.save(model, tmp_path / "model.pt")
    pixels = patterns(2, 4)[0]
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(pixels), model(pixels))


def test_a_run_is_not_its_network(tmp_path):
    write_model(tmp_path / "run/export")
    with pytest.raises(BackboneError, match=r"is a run: give its network, '.*/run/export'"):
        arrest_hub.load(tmp_path / "run")


def test_a_module_without_weights_or_gradients_is_one_clear_error():
    lazy = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(4))
    with torch.inference_mode():
        frozen = robust_net()
    for network, said in ((lazy, "layers without weights yet"), (frozen, r"was made within torch.inference_mode\(\)")):
        with pytest.raises(ConfigError, match=said):
            arrest_hub.evaluate(network, patterns(8, 4), attacks="pgd-1", teacher=None, checks=False)


def test_what_is_no_dataset_and_no_network_is_one_clear_error():
    pixels, labels = patterns(8, 4, seed=7)
    net = robust_net()
    for dataset, named in (
        ([pixels, labels], "dataset is a list"), (torch.utils.data.TensorDataset(pixels, labels), "TensorDataset"),
        (None, "NoneType"), ((pixels.numpy(), labels.numpy()), r"\(ndarray, ndarray\)"),
        ((pixels, labels, labels), r"\(Tensor, Tensor, Tensor\)"), ((pixels,), r"\(Tensor\)"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=named):
            arrest_hub.evaluate(net, dataset, attacks="clean")
    with pytest.raises(ConfigError, match="teacher is a int"):
        arrest_hub.evaluate(net, (pixels, labels), teacher=3)
    with pytest.raises(ConfigError, match="fails on an image of shape"):
        arrest_hub.evaluate(robust_net().bfloat16(), (pixels, labels), attacks="clean")
    with pytest.raises(ConfigError, match="without a gradient"):
        arrest_hub.evaluate(Detached(), (pixels, labels), attacks="clean,pgd-2")
    with pytest.raises(ConfigError, match="without a gradient"):  # the curve is PGD's
        arrest_hub.evaluate(Detached(), (pixels, labels), attacks="clean", eps_curve="0:8/255:2")
    for config in ({"model": "x"}, None):
        for function in (arrest_hub.finetune, arrest_hub.dry_run):
            with pytest.raises(ConfigError, match="give a FinetuneConfig"):
                function(config)
    with pytest.raises(ConfigError, match=r"model is a Sequential.*save_pretrained"):
        arrest_hub.finetune(FinetuneConfig(model=net, dataset="digits"))
    with pytest.raises(ConfigError, match=r"--dataset \(a tuple\)"):
        arrest_hub.finetune(FinetuneConfig(model="resnet18_cifar", dataset=(pixels, labels)))


def test_a_half_precision_model_of_ours_is_refused_and_can_classify(folder):
    model = arrest_hub.from_pretrained(folder / "model").bfloat16()
    (name, probability), *_ = model.classify(Image.new("RGB", (9, 9), (200, 10, 10)))
    assert isinstance(name, str)
    assert 0 < probability <= 1
    with pytest.raises(ConfigError, match=r"bfloat16, and images are float32: give model\.float\(\)"):
        arrest_hub.evaluate(model, patterns(8, 4, seed=7), attacks="clean")


def test_the_callers_tensors_and_modes_are_left_alone():
    pixels, labels = patterns(8, 4, seed=7)
    before = pixels.clone()
    net = InPlace().train()
    net.net.eval()
    arrest_hub.evaluate(net, (pixels, labels), attacks="clean,noise", checks=False)
    with pytest.raises(ConfigError, match=r"\(1, 3, 8, 8\).*in-place"):  # autograd cannot follow it to the pixels
        arrest_hub.evaluate(net, (pixels, labels), attacks="clean,pgd-2", checks=False)
    assert torch.equal(pixels, before)
    assert [net.training, net.net.training] == [True, False]


def test_a_network_that_changes_its_input_is_attacked_like_any_other(few_queries):
    class OutOfPlace(InPlace):
        def forward(self, pixels):
            return self.net(0.5 * pixels)

    pair = patterns(24, 4, seed=7)
    plain, changed = (run(net, pair, attacks="noise,square", eps="90/255") for net in (OutOfPlace(), InPlace()))
    assert [row.correct for row in plain.report.results] == [row.correct for row in changed.report.results]
    assert plain.report.results[-1].correct < plain.report.results[0].correct


def test_a_network_without_gradients_is_measured_with_what_needs_none(few_queries, tmp_path):
    report = arrest_hub.evaluate(
        Detached(), patterns(8, 4, seed=7), attacks="clean,noise,square", output_dir=tmp_path / "out"
    )
    assert len(report.results) == 3
    assert "no gradients" in next(check.finding for check in report.checks if check.status == "skipped")
    assert (tmp_path / "out/figures/per_class.png").is_file()
    assert not (tmp_path / "out/figures/gallery.png").exists()


def test_a_finished_evaluation_is_not_that_of_other_images(tmp_path):
    net, (pixels, labels) = robust_net(), patterns(12, 4, seed=7)
    options = {"attacks": "clean", "output_dir": tmp_path / "out", "checks": False, "figures": False}
    first = arrest_hub.evaluate(net, (pixels, labels), teacher=robust_net(), **options)
    again = arrest_hub.evaluate(net, (pixels, labels), teacher=None, resume=True, **options)
    assert again.results[0].correct == first.results[0].correct, "a teacher that is gone takes nothing away"
    for pair, teacher in (((pixels.flip(0), labels), None), ((pixels, 0 * labels), None),
                          ((pixels, labels), smooth_net(4))):  # fmt: skip
        with pytest.raises(ConfigError, match="cannot resume"):
            arrest_hub.evaluate(net, pair, teacher=teacher, resume=True, **options)
    assert read_results(tmp_path / "out/results.json").results[0].correct == first.results[0].correct


def test_a_finished_evaluation_needs_no_teacher_any_more(folder, tmp_path, capsys):
    shutil.copytree(folder / "model", tmp_path / "teacher")
    command = [str(folder / "model"), "--dataset", str(folder / "data"), "--attacks", "noise", "--num-workers", "0",
               "--no-checks", "--no-figures", "--teacher", str(tmp_path / "teacher"), "--limit-eval", "6",
               "--output-dir", str(tmp_path / "out")]  # fmt: skip
    assert run_cli(eval_command, command) == 0
    table = capsys.readouterr().out.splitlines()[-6:]
    shutil.rmtree(tmp_path / "teacher")
    assert run_cli(eval_command, [*command, "--resume"]) == 0
    assert set(table) & set(capsys.readouterr().out.splitlines())
    assert run_cli(eval_command, [*command, "--overwrite"]) == 2


def test_a_models_folder_that_is_read_only_is_left_as_it_is(tmp_path, monkeypatch, capsys):
    """Tests may run as root, who may write everywhere."""
    from arrest_hub import eval_record

    export = finetune(tiny_config(tmp_path, max_steps=1)).export
    before = {path: path.read_bytes() for path in export.rglob("*") if path.is_file()}
    options = [str(export), "--dataset", str(tmp_path / "data"), "--attacks", "noise", "--num-workers", "0",
               "--teacher", "none", "--eps", EPS, "--no-checks", "--limit-eval", "6"]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(eval_record.os, "access", lambda path, mode: not Path(path).is_relative_to(export))
        assert run_cli(eval_command, [*options, "--output-dir", str(tmp_path / "one")]) == 0
        assert "no permission to write" in capsys.readouterr().out

    def denied(*_args):
        raise PermissionError(13, "Permission denied", "figures/gallery.png")

    monkeypatch.setattr("arrest_hub.evaluation.update_export", denied)
    assert run_cli(eval_command, [*options, "--output-dir", str(tmp_path / "two")]) == 0
    printed = capsys.readouterr().out
    assert "is not brought up to date (Permission denied: figures/gallery.png)" in printed
    assert "95 % intervals" in printed, "the table is there all the same"
    assert {path: path.read_bytes() for path in export.rglob("*") if path.is_file()} == before


def test_the_public_names_are_listed():
    assert set(arrest_hub.__all__) <= set(dir(arrest_hub))
