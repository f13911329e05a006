import json

import numpy as np
import pytest

from arrest_hub.comparison import (
    ComparedModel,
    common_setting,
    comparison_json,
    comparison_markdown,
    comparison_rows,
    comparison_table,
    pair_rows,
    plain_table,
)
from arrest_hub.errors import ConfigError
from arrest_hub.results import Check, EvalReport, Result, harmonic_mean, wilson_interval
from arrest_hub.verdicts import CLEAN, Verdicts

N = 1000


def rows(clean=900, pgd=500, auto=450, *, n=N, dataset="cifar10", split="test", norm="linf", eps="8/255", **parameters):
    place = {"n": n, "dataset": dataset, "split": split, "seed": 0, "seconds": 1.0}
    found = []
    if clean is not None:
        found.append(Result("clean_accuracy", None, None, None, clean, **place))
    for attack, correct in (("autoattack", auto), ("pgd-20", pgd)):
        if correct is not None:
            found.append(Result("robust_accuracy", attack, norm, eps, correct, attack_parameters=parameters, **place))
    return found


def verdicts(right, stands, index=None, attack="pgd-20"):
    n = len(right)
    broken = np.array([None if s else attack if r else CLEAN for r, s in zip(right, stands, strict=True)], dtype=object)
    index = np.arange(n) if index is None else np.array(index)
    return Verdicts(index, np.zeros(n, int), 1 - np.array(right), {attack: broken})


def entry(name, *args, parameters=11_173_962, speed=812.4, seen=None, report=None, **kwargs):
    report = {"hardware": "1 x CPU", "preprocessing": {"size": [32, 32]}} | (report or {})
    model = {} if parameters is None else {"parameters": parameters}
    return ComparedModel(name, EvalReport(rows(*args, **kwargs), model=model, images_per_second=speed, **report), seen)


def two(**changes):
    return [entry("a"), entry("b", 950, 400, None, **({"parameters": 5_400, "speed": 60.25} | changes))]


def cells(line):
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_rows_hold_every_figure():
    first, second = comparison_rows(two())
    bounds = pytest.approx(wilson_interval(900, N), abs=1e-6)
    assert first["clean"] == {"value": 0.9, "ci95": bounds, "attack_parameters": {}}
    assert list(first["robust"]) == list(second["robust"]) == ["pgd-20", "autoattack"]
    assert first["robust"]["autoattack"]["value"] == 0.45
    assert second["robust"]["autoattack"] is None
    assert first["harmonic_mean"] == pytest.approx(harmonic_mean(0.9, 0.45), abs=1e-6)
    assert second["harmonic_mean"] == pytest.approx(harmonic_mean(0.95, 0.4), abs=1e-6)
    assert (first["strongest"], second["strongest"]) == ("autoattack", "pgd-20")
    assert {key: first[key] for key in ("dataset", "split", "n", "norm", "eps", "parameters", "images_per_second")} == {
        "dataset": "cifar10", "split": "test", "n": N, "norm": "linf", "eps": "8/255", "parameters": 11_173_962,
        "images_per_second": 812.4,
    }  # fmt: skip


def test_what_is_unknown_is_none_in_rows_and_a_dash_in_the_table():
    bare = entry("bare", 900, None, None, parameters=None, speed=None)
    row = comparison_rows([bare, entry("b")])[0]
    assert row["robust"] == {"pgd-20": None, "autoattack": None}
    assert [row[key] for key in ("parameters", "images_per_second", "harmonic_mean", "strongest")] == [None] * 4
    line = cells(comparison_table([bare, entry("b")]).splitlines()[4])
    assert line == ["bare", "90.0 % [88.0, 91.7]", "–", "–", "–", "–", "–"]
    assert comparison_rows([bare])[0]["norm"] is None
    assert "linf" not in comparison_table([bare]).splitlines()[0]


def test_the_table():
    lines = comparison_table(two()).splitlines()
    assert lines[0] == "Accuracy on cifar10 [test], 1,000 images, linf 8/255, 95 % intervals in brackets"
    assert cells(lines[2]) == ["model", "clean", "PGD-20", "AutoAttack", "harmonic mean", "parameters", "images/s"]
    assert lines[3] == "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    assert cells(lines[4]) == [
        "a", "90.0 % [88.0, 91.7]", "**50.0 %** [46.9, 53.1]", "45.0 % [41.9, 48.1]", "60.0 %", "11.2 M", "**812**",
    ]  # fmt: skip
    assert cells(lines[5]) == [
        "b", "**95.0 %** [93.5, 96.2]", "40.0 % [37.0, 43.1]", "–", "56.3 %", "**5.4 k**", "60.2",
    ]  # fmt: skip


def test_the_best_are_bold():
    lines = comparison_table([entry("a"), entry("b"), entry("c", 880, 510, 440, speed=20)]).splitlines()
    marked = [[i for i, cell in enumerate(cells(line)) if "**" in cell] for line in lines[4:7]]
    assert marked == [[1, 3, 4, 6], [1, 3, 4, 6], [2]], "ties are all marked, equal columns and the names not at all"
    assert "**" not in comparison_table([entry("a")])
    # what is not comparable has no best
    other = entry("b", 950, 400, None, report={"hardware": "1 x GPU"})
    assert [
        i for i, cell in enumerate(cells(comparison_table([entry("a"), other]).splitlines()[5])) if "**" in cell
    ] == [1]


def test_sizes_are_readable():
    sizes = [999, 1000, 999_949, 999_950, 11_173_962, 1_234_567_890]
    entries = [entry(str(size), parameters=size) for size in sizes]
    shown = [cells(line)[5].strip("*") for line in comparison_table(entries).splitlines()[4:]]
    assert shown == ["999", "1.0 k", "999.9 k", "1.0 M", "11.2 M", "1,234.6 M"]


def test_attacks_stand_from_weak_to_strong():
    place = {"n": N, "dataset": "d", "split": "s", "seed": 0, "seconds": 1.0}
    names = ("autoattack", "square", "pgd-100", "pgd-20", "noise")
    report = EvalReport([Result("robust_accuracy", name, "l2", "0.5", 5, **place) for name in names])
    (row,) = comparison_rows([ComparedModel("a", report)])
    assert list(row["robust"]) == [*reversed(names[2:]), "square", "autoattack"]


@pytest.mark.parametrize(
    ("changes", "value"),
    [({"dataset": "cifar100"}, "cifar100"), ({"split": "train"}, "train"), ({"n": 2000}, "2000"),
     ({"norm": "l2"}, "l2"), ({"eps": "4/255"}, "4/255")],
)  # fmt: skip
def test_what_cannot_be_compared_is_named(changes, value):
    (key,) = changes
    for write in (comparison_table, plain_table, comparison_markdown, comparison_json, comparison_rows):
        with pytest.raises(ConfigError) as caught:
            write([entry("first"), entry("second", **changes)])
        (problem,) = caught.value.problems
        assert f"differ in {key} " in problem
        assert f"{value} (second)" in problem
        assert "(first)" in problem


def test_every_difference_is_named_and_equal_radii_are_none():
    with pytest.raises(ConfigError) as caught:
        common_setting([entry("a"), entry("b", dataset="x", n=1001)])
    assert len(caught.value.problems) == 2
    assert common_setting([entry("a"), entry("b", eps="16/510")]).eps == "8/255"
    with pytest.raises(ConfigError, match="nothing to compare"):
        comparison_table([])
    with pytest.raises(ConfigError, match="'empty' holds no figures"):
        comparison_table([entry("a"), ComparedModel("empty", EvalReport([]))])


def test_what_makes_figures_hard_to_compare_is_noted():
    assert len(comparison_table([entry("a"), entry("b")]).split("\n\n")) == 2
    other = entry(
        "b", 950, 400, None, restarts=5,
        report={"precision": "bf16", "preprocessing": {"size": [224, 224]}, "hardware": "1 x GPU"},
    )  # fmt: skip
    notes = comparison_table([entry("a", restarts=1), other]).split("\n\n")[2].splitlines()
    assert notes == [
        "- precision differs: fp32 (a); bf16 (b)",
        "- image size differs: 32x32 px (a); 224x224 px (b)",
        "- hardware differs, so do not compare speeds: 1 x CPU (a); 1 x GPU (b)",
        "- the harmonic mean is of clean accuracy and different attacks: AutoAttack (a); PGD-20 x5 (b)",
        "- PGD-20 was run differently: restarts 1 (a); restarts 5 (b)",
    ]
    cascade = [entry("a"), entry("b", after=["pgd-20"])]
    assert "on what was left by pgd-20 (b)" in comparison_table(cascade)
    parts = [entry(name, parts=[{"name": p} for p in chosen]) for name, chosen in (("a", ["x", "y"]), ("b", ["x"]))]
    assert "AutoAttack was run differently: parts x y (a); parts x (b)" in comparison_table(parts)


def cascade(name, last=450):
    """Noise, APGD and PGD, each on what the one before left."""
    found = entry(name, 900, None, None)
    place = {"n": N, "dataset": "cifar10", "split": "test", "seed": 0, "seconds": 1.0}
    for attack, correct, before in (("apgd-ce", 500, []), ("pgd-20", last, ["apgd-ce"]),
                                    ("noise", last, ["apgd-ce", "pgd-20"])):  # fmt: skip
        parameters = {"restarts": 5 if attack == "pgd-20" else 1, "after": before}
        found.report.results.append(
            Result("robust_accuracy", attack, "linf", "8/255", correct, attack_parameters=parameters, **place)
        )
    right = np.ones(4, dtype=int)
    broken = {attack: np.array([None, None, None, "pgd-20"], dtype=object) for attack in ("noise", "apgd-ce", "pgd-20")}
    found.verdicts = Verdicts(np.arange(4), np.zeros(4, int), 1 - right, broken)
    return found


def test_a_worst_case_is_never_shown_under_the_name_of_one_attack():
    titles = ["APGD-CE", "PGD-20 x5 after APGD-CE", "noise after APGD-CE, PGD-20"]
    both = [cascade("a"), cascade("b", 400)]
    header, _, first, _ = comparison_table(both).split("\n\n")[1].splitlines()
    assert cells(header)[2:5] == titles, "as they ran"
    assert cells(first)[5] == f"**{100 * harmonic_mean(0.9, 0.45):.1f} %**"
    assert all(title in plain_table(both) for title in titles)
    pairs = comparison_markdown(both).split("## Pairs")[1]
    assert [cells(line)[1] for line in pairs.splitlines() if line.startswith("| a / b")] == ["clean", *titles]
    robust = json.loads(comparison_json(both))["models"][0]["robust"]
    assert robust["noise"]["attack_parameters"]["after"] == ["apgd-ce", "pgd-20"]
    mixed = comparison_table([cascade("a"), entry("b", 900, 460, None)])
    header, _, first, second = mixed.split("\n\n")[1].splitlines()
    assert "PGD-20" in cells(header)
    assert "**" not in first + second, "neither is the best of figures that are not alike"
    assert "of clean accuracy and different attacks: PGD-20 x5 after APGD-CE (a); PGD-20 (b)" in mixed
    pairs = comparison_markdown([*both, entry("c", seen=both[0].verdicts)]).split("## Pairs")[1]
    assert [cells(line)[1] for line in pairs.splitlines() if line.startswith("| a / b")] == ["clean", *titles]
    assert "PGD-20 was run differently: restarts 5, on what was left by apgd-ce (a)" in mixed


def test_names_cannot_break_the_tables():
    name = "x|y\n| evil | 1 |\n\n# title <b>*"
    right = [1, 0, 1]
    warn = {"checks": [Check("c", "warn", 1.0, "f")]}
    bad = [entry(name, dataset="d|\n\ne", seen=verdicts(right, right), report=warn | {"hardware": "y"}),
           entry("b", dataset="d|\n\ne", seen=verdicts(right, right),
                 report={"checks": [Check("c", "warn", 1.0, "f\n\n| g |")], "hardware": "|\n"})]  # fmt: skip
    text = comparison_markdown(bad)
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 2
    for table in tables:
        plain = [line.replace(r"\|", "") for line in table.splitlines()]
        assert len({line.count("|") for line in plain}) == 1
    assert len(tables[0].splitlines()) == 4
    assert [line for line in text.splitlines() if line.startswith("#")] == ["# Comparison", "## Pairs", "## Warnings"]
    assert "<b>" not in text.replace(r"\<b\>", "")
    assert name not in plain_table(bad)
    assert len(plain_table(bad).splitlines()) == len(
        plain_table([entry("a", report={"hardware": "y"}), entry("b", report={"hardware": "x"})]).splitlines()
    )


def test_the_plain_table_is_aligned():
    text = plain_table(two())
    assert text.splitlines()[0].startswith("Accuracy on cifar10 [test], 1,000 images, linf 8/255")
    table = text.splitlines()[1:4]
    assert len({len(line) for line in table}) == 1
    assert table[1].split() == ["a", "90.0", "%", "[88.0,", "91.7]", "*50.0", "%", "[46.9,", "53.1]", "45.0", "%",
                                "[41.9,", "48.1]", "60.0", "%", "11.2", "M", "*812"]  # fmt: skip
    assert text.splitlines()[4] == "*: best of the column"
    assert "best" not in plain_table([entry("a")])
    assert "**" not in text


def test_pairs():
    a = verdicts([1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0])
    b = verdicts([1, 1, 1, 0, 1, 0], [0, 0, 0, 0, 1, 0])
    c = verdicts([1] * 6, [1] * 6, attack="autoattack")
    entries = [entry("a", seen=a), entry("b", seen=b), entry("c", seen=c), entry("d")]
    found = [(row["first"], row["second"], row["attack"], row["both"], row["only_first"], row["only_second"],
              row["neither"]) for row in pair_rows(entries)]  # fmt: skip
    assert found == [
        ("a", "b", None, 3, 1, 1, 1), ("a", "b", "pgd-20", 0, 2, 1, 3), ("a", "c", None, 4, 0, 2, 0),
        ("b", "c", None, 4, 0, 2, 0),
    ]  # fmt: skip
    assert [row["p_value"] for row in pair_rows(entries)] == [1.0, 1.0, 0.5, 0.5]
    text = comparison_markdown(entries)
    assert "McNemar's exact two-sided test" in text
    assert "| a / b | PGD-20 | 0 | 2 | 1 | 3 | 1.000 |" in text
    assert "| a / c | clean | 4 | 0 | 2 | 0 | 0.500 |" in text


def test_small_p_values_are_not_written_as_zero():
    n = 20
    text = comparison_markdown(
        [entry("a", seen=verdicts([1] * n, [1] * n)), entry("b", seen=verdicts([0] * n, [0] * n))]
    )
    assert "| a / b | clean | 0 | 20 | 0 | 0 | < 0.001 |" in text


def test_other_images_are_not_paired():
    right = [1, 0]
    entries = [entry("a", seen=verdicts(right, right)), entry("b", seen=verdicts(right, right, index=[5, 6]))]
    assert pair_rows(entries) == []
    text = comparison_markdown(entries)
    assert "b was evaluated on other images than a" in text
    assert "## Pairs" not in text


def test_the_document_lists_each_models_warnings():
    warn = {"checks": [Check("noise", "warn", 0.5, "Noise hurts more."), Check("steps", "pass", 0.0, "Fine.")]}
    text = comparison_markdown([entry("a"), entry("b", report=warn)])
    assert text.startswith("# Comparison\n\nAccuracy on cifar10")
    assert text.endswith("b:\n\n- noise: Noise hurts more.\n")
    assert "Fine." not in text
    assert "Warnings" not in comparison_markdown(two())


def test_json_is_stable_and_whole():
    right = [1, 0]
    entries = [entry("a", seen=verdicts(right, right)), entry("b", seen=verdicts(right, [0, 0]))]
    data = json.loads(comparison_json(entries))
    assert data == {"format": 1, "models": comparison_rows(entries), "pairs": pair_rows(entries)}
    assert len(data["pairs"]) == 2
    assert comparison_json(entries) == comparison_json(entries)
    assert comparison_json(entries).endswith("}\n")
