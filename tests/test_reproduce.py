"""scripts/reproduce_cifar10.py: its runs are valid, it goes on where it stopped; docs/results.md is what it makes."""

import dataclasses
import json
import shlex
import shutil
from importlib.resources import files
from pathlib import Path

import cifar10_evidence
import cifar10_figures
import cifar10_report
import cifar10_suites
import numpy as np
import pretrained_resnet18
import pytest
import reproduce_cifar10 as reproduce
import torch
from matplotlib.figure import Figure
from tiny import NAMES, tiny_config, write_images
from torch.nn import functional

from arrest_hub import from_pretrained
from arrest_hub.cli import parse_eval, parse_finetune
from arrest_hub.command import run_cli
from arrest_hub.recipe_files import read_recipe

ROOT = Path(__file__).parent.parent
COMMANDS = {"arrest-finetune": parse_finetune, "arrest-eval": parse_eval}


def session_of(name, tmp_path, suite=None, dataset="cifar10"):
    return reproduce.Session(suite or cifar10_suites.SUITES[name], name, dataset, tmp_path, None)


@pytest.mark.parametrize("name", cifar10_suites.SUITES)
def test_every_run_is_a_valid_command(name, tmp_path):
    session = session_of(name, tmp_path)
    for key, variant in cifar10_suites.VARIANTS.items():
        words = reproduce.words(reproduce.finetune_flags(session, variant, 0, tmp_path / key))
        config, _ = parse_finetune(words)
        assert config.seed == 0
        assert config.rgkd_weight == variant.flags.get("rgkd_weight", 10), (
            "the recipe's own does not leak into the rows"
        )
        for flag, value in variant.flags.items():
            assert str(getattr(config, flag)) in (str(value), str(value).title(), f"{value}.0"), flag


def test_the_recipe_is_what_the_tables_call_the_recipe():
    recipe = read_recipe("cifar10_resnet18")
    assert {key: recipe.get(key) for key in cifar10_suites.BEST} == cifar10_suites.BEST
    recipe = read_recipe("cifar10_wrn34_10")
    assert {key: recipe.get(key) for key in cifar10_suites.BEST} == cifar10_suites.BEST


def test_the_recipe_stands_for_the_sweeps_lambda_100():
    """Its runs are a point of the λ sweep and called so in the tables: true as long as nothing else is changed."""
    assert cifar10_suites.BEST == {"rgkd_weight": 100}
    assert "λ 100" in cifar10_suites.VARIANTS["best"].title


def test_runs_are_chosen_by_group_variant_and_seed():
    assert reproduce.chosen_runs("best-seed-1,aft") == [("best", 1), ("aft", 0), ("aft", 1), ("aft", 2)]
    assert {key for key, _ in reproduce.chosen_runs("lambda")} == {"lambda-3", "lambda-30", "lambda-300"}
    assert len(reproduce.chosen_runs("all")) == sum(len(v.seeds) for v in cifar10_suites.VARIANTS.values())
    with pytest.raises(ValueError, match="'bset' is no variant"):
        reproduce.chosen_runs("bset")


def test_a_teacher_that_is_given_is_not_trained(tmp_path):
    given = tmp_path / "pretrained" / "my-resnet18"
    session = dataclasses.replace(session_of("narrow", tmp_path / "runs"), teacher=given)
    assert reproduce.teacher_folder(session) == given, "no command was called"
    flags = reproduce.finetune_flags(session, cifar10_suites.VARIANTS["arrest"], 0, tmp_path / "runs" / "arrest-seed-0")
    text = reproduce.portable(session, ["finetune", *reproduce.words(flags)])
    assert "--model ./my-resnet18 " in text
    assert str(tmp_path) not in text
    kept = ROOT / "docs" / "evidence" / "narrow" / "teacher" / "model"
    session = dataclasses.replace(session, teacher=kept)
    assert "--model docs/evidence/narrow/teacher/model " in reproduce.portable(
        session, ["finetune", "--model", str(kept), "-"]
    )
    assert from_pretrained(kept)(torch.rand(1, 3, 32, 32)).shape == (1, 10)
    with pytest.raises(SystemExit):
        reproduce.parse(["--teacher", str(tmp_path)])


@pytest.fixture
def tiny_session(tmp_path, monkeypatch):
    """A session on tiny images and a tiny network, whose commands run in this process and can be cut short."""
    write_images(tmp_path / "data", names=[*NAMES, "none of them"])  # APGD-T wants four classes
    config = tiny_config(tmp_path)
    suite = cifar10_suites.Suite(
        title="tiny", recipe="default",
        model={"model": "resnet18_cifar", "model_args": "channels=[4,4,8,8]", "image_size": 8},
        teacher={"standard_epochs": 1, "batch_size": 8, "mixed_precision": "no", "num_workers": 0},
        budget={"epochs": 1, "attack_steps": 1, "batch_size": 8, "num_workers": 0, "image_size": 8},
        evaluation={"limit_eval": 12, "batch_size": 12, "num_workers": 0},
    )  # fmt: skip
    calls = []

    def call(self, command, log):
        from arrest_hub.cli import eval_command, finetune_command

        if calls and calls[-1] == "time is up":
            calls.pop()
            raise reproduce.TimeIsUp
        calls.append(command)
        log.parent.mkdir(parents=True, exist_ok=True)
        kind = {"finetune": finetune_command, "eval": eval_command}[command[0]]
        assert run_cli(kind, command[1:]) == 0
        log.write_text("passes      per image and step: 1 attack, 1 training\n")
        return 1.0

    monkeypatch.setattr(reproduce.Session, "call", call)
    monkeypatch.setattr(reproduce, "EVIDENCE", tmp_path / "evidence")
    return session_of("tiny", tmp_path / "runs", suite, config.dataset), calls, tmp_path


def test_from_nothing_to_kept_figures_and_on_after_a_stop(tiny_session):
    session, calls, tmp_path = tiny_session
    reproduce.teacher_folder(session)
    reproduce.train(session, "rgkd", 0)
    calls.append("time is up")
    with pytest.raises(reproduce.TimeIsUp):
        reproduce.attack(session, "rgkd", 0, "pgd")
    made = len(calls)
    reproduce.teacher_folder(session)
    reproduce.train(session, "rgkd", 0)
    assert len(calls) == made, "nothing is done twice"
    reproduce.attack(session, "rgkd", 0, "pgd")
    reproduce.attack(session, "rgkd", 0, "pgd")
    assert len(calls) == made + 1

    folder = tmp_path / "evidence" / "tiny" / "rgkd-seed-0"
    results = json.loads((folder / "results.json").read_text())["results"]
    assert [result["attack"] for result in results] == [None, "pgd-20"]
    facts = json.loads((folder / "run.json").read_text())
    for command in facts["commands"]:
        words = shlex.split(command)
        assert COMMANDS[words[0]](words[1:]), "a command that anybody can type"
        assert str(tmp_path) not in command
    assert "runs/tiny/teacher/teacher" in facts["commands"][0]
    assert facts["train_minutes"] > 0
    record = json.loads((session.folder / "rgkd-seed-0" / "export" / "training_record.json").read_text())
    assert facts["hardware"] == record["hardware"]
    assert facts["log"][0]["step"] >= 1
    assert not reproduce.has_figure(session, "rgkd", 0, "apgd")
    reproduce.attack(session, "rgkd", 0, "apgd")
    assert reproduce.has_figure(session, "rgkd", 0, "pgd")
    assert reproduce.has_figure(session, "rgkd", 0, "apgd")
    assert not reproduce.has_figure(session, "rgkd", 0, "autoattack")
    (folder / "run.json").write_text(json.dumps(facts | {"hardware": "what trained it"}))
    row = cifar10_evidence.read_row(folder)
    assert row.hardware == "what trained it", "whatever evaluates"
    assert row.counts["clean"] >= row.counts["pgd-20"] >= row.counts["apgd"], "a cascade: the worst case so far"

    shutil.rmtree(session.folder / "rgkd-seed-0")  # another machine, which has the figures and not the weights
    made = len(calls)
    reproduce.train(session, "rgkd", 0)
    assert len(calls) == made
    with pytest.raises(SystemExit, match="no weights to attack"):
        reproduce.attack(session, "rgkd", 0, "autoattack")
    reproduce.train(dataclasses.replace(session, attacks=("pgd", "autoattack")), "rgkd", 0)
    assert len(calls) == made + 1, "AutoAttack is wanted, and needs the weights again"

    text = "\n".join(cifar10_report.suite_text("tiny", tmp_path / "evidence" / "tiny"))
    clean = 100 * results[0]["correct"] / results[0]["n"]
    assert f"| AFT + RGKD (λ 10) | 1 | {clean:.1f} |" in text


def evidence(folder, key, seed, counts):
    place = folder / f"{key}-seed-{seed}"
    place.mkdir(parents=True)
    results = [
        {"attack": None if name == "clean" else name, "correct": right, "n": 1000} for name, right in counts.items()
    ]
    (place / "results.json").write_text(json.dumps({"results": results}))
    (place / "run.json").write_text(json.dumps({"train_minutes": 2.0, "passes": "3 attack", "log": [], "commands": []}))


def test_the_table_counts_what_is_there(tmp_path):
    for seed, clean in enumerate((600, 610, 620)):
        evidence(tmp_path, "aft", seed, {"clean": clean, "pgd-20": 200} | ({"autoattack": 180} if seed < 2 else {}))
    evidence(tmp_path, "arrest", 0, {"clean": 700, "pgd-20": 200})
    lines = cifar10_report.suite_text("narrow", tmp_path)
    (aft,) = [line for line in lines if line.startswith("| AFT |")]
    # the harmonic mean of 61 % and 20 % is 30.1 %
    assert aft.split("|")[2:10] == [
        " 3 ", " 61.0 (60.0–62.0) ", " 20.0 (20.0–20.0) ", " – ", " 18.0 (18.0–18.0) of 2 ", " 30.1 (30.0–30.2) ",
        " – ", " 27.7 (27.7–27.8) ",
    ]  # fmt: skip
    (arrest,) = [line for line in lines if line.startswith("| ARREST (λ 10")]
    assert arrest.split("|")[5:10] == [" – ", " – ", " 31.1 ", " – ", " – "], "what is not measured is not guessed"


def test_minutes_of_several_machines_are_kept_apart():
    times = ((4.0, "a"), (5.0, "a"), (6.0, "a"), (9.0, "b"), (11.0, "b"), (9.0, "c"))
    runs = [cifar10_evidence.Row(0, {}, {"train_minutes": minutes}, place) for minutes, place in times]
    marks = cifar10_report.hardware_marks({"aft": runs[:2], "arrest": runs[2:]})
    assert marks == {"a": "", "b": "*", "c": "**"}
    assert cifar10_report.minutes_text(runs, marks) == "5.0, 10.0*, 9.0**"
    assert cifar10_report.minutes_text(runs[3:5], marks) == "10.0*"
    assert cifar10_report.hardware_text({"aft": runs})[0] == r"Minutes are of a; with \*, of b; with \*\*, of c."
    assert cifar10_report.hardware_text({"aft": runs[:3]}) == [], "there is no star"


def test_what_apgd_leaves_is_read_from_autoattack_and_from_a_cascade(tmp_path):
    parts = [{"name": name, "attacked": 0, "broken": broken}
             for name, broken in {"apgd-ce": 300, "apgd-t": 90, "fab-t": 2, "square": 8}.items()]  # fmt: skip
    whole = {"attack": "autoattack", "correct": 200, "n": 1000, "attack_parameters": {"parts": parts}}
    assert cifar10_evidence.left_by_apgd([whole]) == (210, 1000), "600 right, 390 broken by APGD"
    half = {"attack": "apgd-t", "correct": 205, "n": 1000, "attack_parameters": {"after": ["pgd-20", "apgd-ce"]}}
    assert cifar10_evidence.left_by_apgd([half]) == (205, 1000)
    alone = {"attack": "apgd-t", "correct": 220, "n": 1000, "attack_parameters": {}}
    assert cifar10_evidence.left_by_apgd([alone]) is None, "APGD-T alone is a weaker attack"
    assert cifar10_evidence.left_by_apgd([{"attack": "pgd-20", "correct": 250, "n": 1000}]) is None

    counts = {"apgd": (2000, 9000), "autoattack": (1990, 9000)}
    rows = [cifar10_evidence.Row(0, counts, {}), cifar10_evidence.Row(1, {"apgd": (100, 1000)}, {})]
    (text, _) = cifar10_report.apgd_text({"aft": rows})
    assert "Of the 2,000 images that it left on 1 network, the other half, FAB-T and Square, broke 10." in text
    assert cifar10_report.apgd_text({"aft": rows[1:]}) == []


def test_the_report_in_the_docs_is_made_from_the_evidence(tmp_path):
    """Every figure of the tables can be traced to a results.json beside its commands."""
    text = (ROOT / "docs" / "results.md").read_text()
    for folder in sorted(path for path in reproduce.EVIDENCE.iterdir() if path.is_dir()):
        begin, end = cifar10_report.BEGIN.format(folder.name), cifar10_report.END.format(folder.name)
        part = text.partition(begin)[2].partition(end)[0].strip("\n").splitlines()
        teachers = set()
        assert part == "\n".join(cifar10_report.suite_text(folder.name, folder)).strip("\n").splitlines()
        for run in folder.glob("*-seed-*"):
            facts = json.loads((run / "run.json").read_text())
            for command in facts["commands"]:
                words = shlex.split(command)
                assert COMMANDS[words[0]](words[1:])
            teachers.add(parse_finetune(shlex.split(facts["commands"][0])[1:])[0].model)
            assert (run / "results.json").is_file()
        kept = f"docs/evidence/{folder.name}/teacher/model"  # the same network, for those who do not train it again
        assert len(teachers - {kept}) <= 1, "rows that are compared start from one network"


def test_the_recipe_is_above_the_others_by_more_than_seeds_differ():
    """What docs/results.md says first."""
    rows = cifar10_evidence.read_suite(reproduce.EVIDENCE / "narrow")

    def harmonic(key):
        values = [row.harmonic("autoattack") for row in rows[key]]
        assert len(values) == 3
        return values

    best = harmonic("best")
    for key in ("at", "trades", "aft"):
        other = harmonic(key)
        spread = max(max(best) - min(best), max(other) - min(other))
        assert min(best) - max(other) > spread, key


def test_every_variant_of_the_tables_is_measured_under_apgd():
    rows = cifar10_evidence.read_suite(reproduce.EVIDENCE / "narrow")
    assert list(rows) == list(cifar10_suites.VARIANTS)
    for key, runs in rows.items():
        assert [run.seed for run in runs] == list(cifar10_suites.VARIANTS[key].seeds), key
        assert all(run.counts.get("apgd", (0, 0))[1] == 1000 for run in runs), key


def test_figures_can_be_drawn_of_part_of_the_runs(tmp_path):
    for key in ("aft", "best", "lambda-30"):
        evidence(tmp_path / "narrow", key, 0, {"clean": 600, "pgd-20": 200})
    rows = {"narrow": cifar10_evidence.read_suite(tmp_path / "narrow")}
    cifar10_figures.draw_tradeoff(tmp_path / "tradeoff.png", rows)
    cifar10_figures.draw_drift(tmp_path / "drift.png", rows["narrow"])
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("tradeoff.png", "drift.png"))


def test_a_sweeps_curve_has_the_points_that_are_measured():
    rows = {key: [cifar10_evidence.Row(0, {"clean": (clean, 1000)} | apgd, {})]
            for key, clean, apgd in (("lambda-3", 580, {"apgd": (210, 1000)}), ("arrest", 600, {"apgd": (220, 1000)}),
                                     ("lambda-30", 620, {}), ("best", 650, {"apgd": (230, 1000)}))}  # fmt: skip
    axes = Figure().subplots()
    cifar10_figures.draw_sweeps(axes, "λ and τ", rows)
    (curve,) = axes.lines  # λ alone: of τ there is one point
    assert curve.get_xydata().tolist() == pytest.approx(np.array([[58, 21], [60, 22], [65, 23]]))
    assert [text.get_text() for text in axes.texts] == ["λ 3", "λ 10", "λ 100"]
    cifar10_figures.draw_methods(axes, rows)
    assert len(axes.containers) == 2, "a point with its interval for ARREST and for the recipe"


def test_the_parts_are_drawn_from_aft_to_the_recipe_of_one_seed():
    def rows(*points):
        return [cifar10_evidence.Row(seed, {"clean": (clean, 1000), "apgd": (left, 1000)}, {})
                for seed, clean, left in points]  # fmt: skip

    axes = Figure().subplots()
    parts = {
        "aft-lr-0.04-fp32": rows((0, 500, 200), (1, 520, 220)),
        "best-lr-0.04-fp32": rows((1, 630, 250)),
        "best-lr-0.04-awp-fp32": rows((1, 610, 240)),
        "best-lr-0.04-ema-hold-fp32": rows((2, 640, 230)),
    }
    cifar10_figures.draw_parts(axes, parts)
    drawn = [np.ravel(line.get_xydata()).tolist() for line in axes.lines]
    expected = [[50, 20], [52, 22, 63, 25], [63, 25, 61, 24], [61, 24]]
    assert drawn == [pytest.approx(points) for points in expected], "the other seed, the path, AWP's line and point"
    assert [text.get_text() for text in axes.texts] == ["AFT", "+ replay:\nthe recipe", "AWP"]


def test_what_a_figure_names_is_a_variant():
    named = [*cifar10_figures.METHODS, *cifar10_figures.PARTS]
    named += [key for curves in cifar10_figures.SWEEPS.values() for *_, names in curves.values() for key in names]
    assert set(named) <= set(cifar10_suites.VARIANTS)


def test_a_report_without_a_place_is_an_error(tmp_path):
    (tmp_path / "docs" / "figures").mkdir(parents=True)
    (tmp_path / "docs" / "results.md").write_text("# nothing\n")
    evidence(tmp_path / "evidence" / "narrow", "aft", 0, {"clean": 600, "pgd-20": 200})
    with pytest.raises(ValueError, match="no place for the suite 'narrow'"):
        cifar10_report.write_report(tmp_path / "evidence", tmp_path / "docs")


def test_the_pretrained_resnet18_is_a_model_folder(tmp_path, capsys):
    """A second reading of the weights: their own layer names, in PyTorch's operations."""
    out = tmp_path / "resnet18_cifar10"
    assert pretrained_resnet18.main(["--output-dir", str(out)]) == 0
    with (files("pyautoattack") / "examples" / "model_test.pt").open("rb") as file:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    pixels = torch.rand(4, 3, 32, 32)
    model = from_pretrained(out)
    with torch.no_grad():
        assert torch.allclose(model(pixels), resnet18_by_hand(weights, pixels), atol=1e-4)
    assert model.label_names[3] == "cat"
    with pytest.raises(SystemExit) as stopped:
        pretrained_resnet18.main(["--output-dir", str(out)])
    assert stopped.value.code == 2
    assert "exists already" in capsys.readouterr().err


def resnet18_by_hand(weights, x):
    def conv(name, x, stride=1):
        kernel = weights[f"{name}.weight"]
        return functional.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)

    def norm(name, x):
        mean, var, weight, bias = (
            weights[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return functional.batch_norm(x, mean, var, weight, bias)

    x = norm("bn1", conv("conv1", x)).relu()
    for stage in range(1, 5):
        for block in range(2):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and not block else 1
            y = norm(f"{name}.bn1", conv(f"{name}.conv1", x, stride)).relu()
            y = norm(f"{name}.bn2", conv(f"{name}.conv2", y))
            if f"{name}.shortcut.0.weight" in weights:
                x = norm(f"{name}.shortcut.1", conv(f"{name}.shortcut.0", x, stride))
            x = (x + y).relu()
    return functional.linear(x.mean((2, 3)), weights["linear.weight"], weights["linear.bias"])


@pytest.mark.parametrize("suite", ["resnet18", "wrn34_10"])
def test_a_suite_for_a_gpu_is_refused_before_it_trains(suite, monkeypatch, capsys):
    monkeypatch.setattr(reproduce.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as raised:
        reproduce.parse(["--suite", suite])
    assert raised.value.code == 2
    assert f"--suite {suite} attacks in TF32" in capsys.readouterr().err
    assert reproduce.parse(["--suite", suite, "--stages", "train"]).suite == suite
    monkeypatch.setattr(reproduce.torch.cuda, "is_available", lambda: True)
    assert reproduce.parse(["--suite", suite]).suite == suite
