import json

import pytest

from arrest_hub.results import EvalReport, Result, harmonic_mean, read_results, results_table, wilson_interval


def make(metric="clean_accuracy", correct=90, **changes):
    values = {
        "metric": metric, "attack": None, "norm": None, "eps": None, "correct": correct, "n": 100, "dataset": "digits",
        "split": "test", "seed": 0, "seconds": 1.25,
    }  # fmt: skip
    return Result(**(values | changes))


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
    robust = make("robust_accuracy", 45, attack="pgd-20", norm="linf", eps="8/255", attack_parameters={"steps": 20})
    report = EvalReport([make(), robust], [make(correct=95)], versions={"torch": "x"}, hardware="1 x CPU")
    path = tmp_path / "results.json"
    path.write_text(report.to_json())
    assert read_results(path) == report
    entry = json.loads(path.read_text())["results"][1]
    assert entry["value"] == 0.45
    assert entry["ci95"] == pytest.approx(wilson_interval(45, 100), abs=1e-6)
    assert report.get("robust_accuracy").correct == 45
    assert report.get("clean_accuracy", teacher=True).correct == 95
    path.write_text("{}")
    with pytest.raises(ValueError, match="not a results file"):
        read_results(path)


def test_tables():
    robust = make("robust_accuracy", 45, attack="pgd-20", norm="linf", eps="8/255")
    report = EvalReport([make(), robust], [make(correct=95), make("robust_accuracy", 0)])
    text = results_table(report, "teacher", "student")
    assert text.splitlines()[0].split() == ["model", "clean", "PGD-20", "(linf", "8/255)"]
    assert "90.0 % [82.6, 94.5]" in text
    markdown = results_table(report, "teacher", "student", markdown=True).splitlines()
    assert markdown[1] == "| --- | ---: | ---: |"
    assert markdown[2].startswith("| teacher | 95.0 %")
