import copy
import dataclasses
import json
import os
from pathlib import Path

import jsonschema
import pytest

from arrest_hub.results import (
    Check,
    CurvePoint,
    EvalReport,
    Result,
    attack_title,
    column_title,
    escape_markdown,
    harmonic_mean,
    merge_reports,
    read_results,
    results_table,
    wilson_interval,
)

SCHEMA = json.loads((Path(__file__).parent.parent / "docs" / "results.schema.json").read_text(encoding="utf-8"))


def make(metric="clean_accuracy", correct=90, **changes):
    values = {
        "metric": metric, "attack": None, "norm": None, "eps": None, "correct": correct, "n": 100, "dataset": "digits",
        "split": "test", "seed": 0, "seconds": 1.25,
    }  # fmt: skip
    return Result(**(values | changes))


def robust(attack="pgd-20", correct=45, **changes):
    return make("robust_accuracy", correct, **({"attack": attack, "norm": "linf", "eps": "8/255"} | changes))


def full_report():
    parts = [{"name": "apgd-ce", "iterations": 100, "restarts": 1, "attacked": 90, "broken": 48, "seconds": 3.5}]
    return EvalReport(
        [make(), robust(attack_parameters={"steps": 20, "step_size": 0.0078}),
         robust("autoattack", 42, attack_parameters={"version": "standard", "parts": parts, "not_run": []})],
        [make(correct=95), robust(correct=0)],
        preprocessing={"size": [32, 32], "mean": [0.5, 0.5, 0.5]},
        versions={"torch": "2.11"},
        hardware="1 x CPU",
        model={"id": "runs/é", "revision": None, "architecture": "resnet18_cifar", "parameters": 11_173_962,
               "weights_sha256": "a" * 64, "teacher": "timm/x"},
        images_per_second=812.5,
        checks=[Check("steps", "pass", 0.01, "Fine."), Check("noise", "warn", 0.5, "Bad."),
                Check("transfer", "skipped", None, "Not measured: no teacher.")],
        eps_curve={"student": [CurvePoint("0", 90, 100), CurvePoint("8/255", 45, 100)],
                   "teacher": [CurvePoint("0", 95, 100), CurvePoint("8/255", 0, 100)]},
    )  # fmt: skip


def test_wilson_interval_equals_published_values():
    # Newcombe 1998, Statistics in Medicine 17, 857-872, table I, method 3
    for successes, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert wilson_interval(successes, n) == pytest.approx((low, high), abs=1e-4)
    assert wilson_interval(10, 10)[1] == 1.0
    with pytest.raises(ValueError, match="11 of 10"):
        wilson_interval(11, 10)


def test_harmonic_mean():
    assert harmonic_mean(0.8, 0.4) == pytest.approx(2 / (1 / 0.8 + 1 / 0.4))
    assert harmonic_mean(0.0, 0.0) == 0


def test_results_survive_the_file(tmp_path):
    report = full_report()
    path = tmp_path / "results.json"
    report.write(path)
    assert read_results(path) == report
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]
    entry = json.loads(path.read_text(encoding="utf-8"))["results"][1]
    assert entry["value"] == 0.45
    assert entry["ci95"] == pytest.approx(wilson_interval(45, 100), abs=1e-6)


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    EvalReport([make()]).write(path)

    def killed(descriptor):
        os.truncate(descriptor, 10)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        full_report().write(path)
    assert read_results(path) == EvalReport([make()])


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{}", "not a results file"), ("[]", "not a results file"), ('{"format": 2}', "not a results file"),
     ('{"format": 1}', "damaged.*results"), ('{"format": 1, "results": [{}], "teacher_results": []}', "damaged"),
     ('{"format": 1, "results": [], "teacher_results": [], "checks": [{"title": 1}]}', "damaged")],
)  # fmt: skip
def test_other_files_are_refused(tmp_path, text, reason):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=reason):
        read_results(path)


def test_the_schema_is_one_and_describes_a_full_and_an_empty_report():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    for report in (full_report(), EvalReport([make()])):
        jsonschema.validate(json.loads(report.to_json()), SCHEMA, cls=jsonschema.Draft202012Validator)


def change(data, path, value):
    *parents, last = path
    for key in parents:
        data = data[key]
    if value is KeyError:
        del data[last]
    else:
        data[last] = value


BROKEN = [
    (("format",), 2),
    (("results",), {}),
    (("hardware",), None),
    (("precision",), "fp8"),
    (("surplus",), 1),
    (("images_per_second",), "fast"),
    (("versions", "torch"), 2),
    (("model", "weights_sha256"), "short"),
    (("results", 0, "metric"), "accuracy"),
    (("results", 0, "attack"), "pgd-20"),
    (("results", 0, "surplus"), 1),
    (("results", 1, "eps"), None),
    (("results", 1, "eps"), 0.03),
    (("results", 1, "norm"), "l3"),
    (("results", 1, "attack"), None),
    (("results", 1, "value"), 45),
    (("results", 1, "ci95"), [0.4]),
    (("results", 1, "ci95"), [0.4, 1.2]),
    (("results", 1, "n"), 0),
    (("results", 1, "correct"), -1),
    (("results", 1, "correct"), 4.5),
    (("teacher_results", 0, "seconds"), -1),
    (("teacher_results", 0, "split"), KeyError),
    (("checks", 0, "status"), "failed"),
    (("checks", 0, "value"), None),
    (("checks", 2, "value"), 0.5),
    (("eps_curve", "student", 0, "n"), KeyError),
    (("eps_curve", "other"), []),
]


@pytest.mark.parametrize(("path", "value"), BROKEN, ids=lambda x: ".".join(map(str, x)) if isinstance(x, tuple) else "")
def test_the_schema_refuses(path, value):
    data = json.loads(full_report().to_json())
    change(data, path, value)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, SCHEMA, cls=jsonschema.Draft202012Validator)


@pytest.mark.parametrize("key", json.loads(EvalReport([]).to_json()))
def test_the_schema_requires_every_key(key):
    data = json.loads(full_report().to_json())
    del data[key]
    with pytest.raises(jsonschema.ValidationError, match=key):
        jsonschema.validate(data, SCHEMA, cls=jsonschema.Draft202012Validator)


def test_get_finds_by_metric_attack_and_network():
    report = full_report()
    assert report.get("clean_accuracy").correct == 90
    assert report.get("clean_accuracy", teacher=True).correct == 95
    assert report.get("robust_accuracy").attack == "autoattack"
    assert report.get("robust_accuracy", attack="pgd-20").attack == "pgd-20"
    assert report.get("robust_accuracy", attack="autoattack").correct == 42
    assert report.get("robust_accuracy", attack="autoattack", teacher=True) is None
    assert report.get("robust_accuracy", attack="pgd-50") is None


def test_strongest_is_the_lowest():
    assert EvalReport([make()]).strongest() is None
    assert EvalReport([make(correct=1), robust("pgd-20", 50), robust("square", 40)]).strongest().attack == "square"
    assert EvalReport([robust("noise", 30), robust("pgd-20", 40)]).strongest().attack == "pgd-20"
    assert EvalReport([robust("noise", 30)]).strongest() is None, "it is no attack"
    both = [robust("autoattack", 40), robust("pgd-20", 40), robust("fab-t", 40)]
    assert EvalReport(both).strongest().attack == EvalReport(both[::-1]).strongest().attack == "autoattack"
    # figures of other images, or at another radius, say nothing of these
    other = dataclasses.replace(robust("autoattack", 5), dataset="another")
    smaller = dataclasses.replace(robust("autoattack", 4), eps="4/255")
    assert EvalReport([robust("noise", 1), robust("pgd-20", 40), other, smaller]).strongest().correct == 40
    assert EvalReport([robust("pgd-20", 40), robust("noise", 1)]).get("robust_accuracy", attack="noise").correct == 1
    mixed = EvalReport([make(), other, robust("pgd-20", 40)])
    assert mixed.strongest().correct == 40, "of the images that the clean figure is of"
    # in a cascade, or where AutoAttack was the weaker one
    assert EvalReport([robust("autoattack", 40), robust("pgd-20", 39)]).strongest().attack == "pgd-20"


def test_warnings_are_the_checks_that_warn():
    assert [check.name for check in full_report().warnings] == ["noise"]


def test_attack_titles():
    names = ("autoattack", "noise", "square", "pgd-20", "apgd-ce")
    assert [attack_title(name) for name in names] == ["AutoAttack", "noise", "Square", "PGD-20", "APGD-CE"]


def test_merging_replaces_the_same_figure_and_keeps_the_others():
    old, before = full_report(), copy.deepcopy(full_report())
    new = EvalReport(
        [make(correct=91), robust("pgd-20", 44), robust("pgd-20", 20, eps="16/255"), make(correct=70, dataset="other")],
        hardware="2 x CPU",
        model={"parameters": 5},
    )
    merged = merge_reports(old, new)
    assert [(row.attack, row.eps, row.dataset, row.correct) for row in merged.results] == [
        (None, None, "digits", 91),
        (None, None, "other", 70),
        ("pgd-20", "8/255", "digits", 44),
        ("pgd-20", "16/255", "digits", 20),
        ("autoattack", "8/255", "digits", 42),
    ]
    assert merged.teacher_results == old.teacher_results
    assert (merged.hardware, merged.images_per_second) == ("2 x CPU", 812.5)
    assert merged.checks == old.checks
    assert merged.eps_curve == old.eps_curve
    assert merged.model == old.model | {"parameters": 5}
    assert old == before, "the reports themselves are left alone"
    new.checks, new.eps_curve, new.images_per_second = [Check("x", "pass", 0.0, "y")], {"model": []}, 3.0
    merged = merge_reports(old, new)
    assert (merged.eps_curve, merged.images_per_second) == ({"model": []}, 3.0)
    assert merged.checks == old.checks + new.checks


def test_tables():
    report = EvalReport([make(), robust()], [make(correct=95), robust(correct=0)])
    text = results_table(report, "teacher", "student")
    assert text.splitlines()[0].split() == ["model", "clean", "PGD-20", "(linf", "8/255)"]
    assert "90.0 % [82.6, 94.5]" in text
    assert len({len(line) for line in text.splitlines()}) == 1
    markdown = results_table(report, "teacher", "student", markdown=True).splitlines()
    assert markdown[1] == "| --- | ---: | ---: |"
    assert markdown[2].startswith("| teacher | 95.0 %")


def test_the_teachers_figures_stand_under_their_own_titles():
    report = EvalReport(
        [make(), robust("autoattack", 42), robust("pgd-20", 45)],
        [robust("pgd-20", 3), robust("pgd-20", 1, eps="16/255"), make(correct=95)],
    )
    rows = [line.strip("| ").split(" | ") for line in results_table(report, "t", "s", markdown=True).splitlines()]
    assert rows[0] == ["model", "clean", "AutoAttack (linf 8/255)", "PGD-20 (linf 8/255)"]
    assert [cell.split(" %")[0] for cell in rows[2]] == ["t", "95.0", "–", "3.0"]
    assert [cell.split(" %")[0] for cell in rows[3]] == ["s", "90.0", "42.0", "45.0"]


def test_a_teachers_figure_of_another_strength_is_not_compared():
    pgd = {"restarts": 1, "step_size": 0.01}
    names = ("pgd-20", "noise", "pgd-7", "pgd-3")
    ours = (pgd | {"restarts": 5}, {"after": ["pgd-20"]}, pgd, pgd)
    theirs = (pgd, {}, pgd | {"step_size": 0.1}, pgd)
    rows = [[robust(n, attack_parameters=p) for n, p in zip(names, side, strict=True)] for side in (ours, theirs)]
    table = results_table(EvalReport([make(), *rows[0]], [make(), *rows[1]]), "t", "s", markdown=True)
    teacher, student = (line.strip("| ").split(" | ") for line in table.splitlines()[2:])
    assert [cell == "–" for cell in teacher[1:]] == [False, True, True, True, False]
    assert "–" not in student


def test_figures_of_several_datasets_say_which():
    report = EvalReport([make(), make(correct=50, dataset="other")], [make(correct=95)])
    header, _, teacher, _ = results_table(report, "t", "s", markdown=True).splitlines()
    assert header == "| model | clean on digits [test] | clean on other [test] |"
    assert teacher.startswith("| t | 95.0 %")
    assert teacher.endswith("| – |")


def test_names_cannot_break_a_table():
    report = EvalReport([make()], [make()])
    markdown = results_table(report, "a|b\nc\\|d", "*x* __y__ a_b <i> [k](l) [0, 1]", markdown=True).splitlines()
    assert len(markdown) == 4
    assert markdown[2].startswith(r"| a\|b c\\\|d | 90.0 %")
    assert markdown[3].startswith(r"| \*x\* \_\_y\_\_ a_b \<i\> \[k](l) [0, 1] | ")
    assert "\x1b" not in results_table(report, "\x1b[31mred", "s")
    assert escape_markdown("plain (8/255)") == "plain (8/255)"


def test_titles_say_what_a_figure_is():
    robust = make("robust_accuracy", 45, attack="pgd-20", norm="linf", eps="8/255")
    assert column_title(make()) == "clean"
    assert column_title(robust) == "PGD-20 (linf 8/255)"
    robust.attack_parameters = {"restarts": 5}
    assert column_title(robust) == "PGD-20 x5 (linf 8/255)"
    square = make("robust_accuracy", 40, attack="square", norm="l2", eps="0.5", attack_parameters={"after": ["pgd-20"]})
    assert column_title(square) == "Square after PGD-20 (l2 0.5)"


def test_a_later_run_does_not_take_a_warning_off_the_card():
    warned = Check("share of zero gradients", "warn", 0.4, "40 %.")
    old = EvalReport([make()], checks=[Check("chance", "pass", 0.9, "90 %."), warned])
    skipped = Check("share of zero gradients", "skipped", None, "Not measured.")
    later = EvalReport([make()], checks=[Check("chance", "pass", 0.8, "80 %."), skipped])
    assert merge_reports(old, later).checks == [Check("chance", "pass", 0.8, "80 %."), warned]
    measured = Check("share of zero gradients", "pass", 0.0, "0 %.")
    assert merge_reports(old, EvalReport([make()], checks=[measured])).checks[1] == measured


def test_the_robust_accuracy_is_of_the_split_of_the_clean_one():
    other = dataclasses.replace(robust("autoattack", 5), split="train")
    assert EvalReport([make(), other, robust("pgd-20", 40)]).strongest().correct == 40
