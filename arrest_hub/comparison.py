"""Several models side by side: one table of their figures, and image by image for each pair of them. No torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from arrest_hub.errors import ConfigError
from arrest_hub.results import (
    MISSING,
    EvalReport,
    Result,
    accuracy_cell,
    aligned_table,
    attack_rank,
    attack_title,
    escape_markdown,
    harmonic_mean,
    markdown_table,
    one_line,
    radius,
    result_title,
    wilson_interval,
)
from arrest_hub.verdicts import Verdicts, compare_pairs, same_images

FORMAT_VERSION = 1
Row = dict[str, Any]


@dataclass
class ComparedModel:
    """One evaluated model. ``verdicts`` may be unknown: it is then not compared image by image."""

    name: str
    report: EvalReport
    verdicts: Verdicts | None = None


@dataclass(frozen=True)
class Setting:
    """What figures must have in common to stand in one table; ``norm`` and ``eps`` are None if all are clean."""

    dataset: str
    split: str
    n: int
    norm: str | None
    eps: str | None

    def title(self) -> str:
        """``cifar10 [test], 1,000 images, linf 8/255``."""
        threat = f", {self.norm} {self.eps}" if self.norm else ""
        return f"{self.dataset} [{self.split}], {self.n:,} images{threat}"


def common_setting(entries: Sequence[ComparedModel]) -> Setting:
    """What all figures were measured on and with.

    Raises:
        ConfigError: there are no figures, or they differ in dataset, split, n, norm or eps: a line for each.
    """
    if not entries:
        raise ConfigError("there is nothing to compare: give at least one evaluation.")
    problems = [f"the evaluation of {entry.name!r} holds no figures." for entry in entries if not entry.report.results]
    found: dict[str, Any] = {}
    for key in ("dataset", "split", "n", "norm", "eps"):
        seen: dict[Any, tuple[Any, list[str]]] = {}  # value -> (value as written, names of the models)
        for entry in entries:
            for row in entry.report.results:
                if (value := getattr(row, key)) is not None:
                    number = radius(value) if key == "eps" else value  # 16/510 is 8/255
                    names = seen.setdefault(number, (value, []))[1]
                    if entry.name not in names:
                        names.append(entry.name)
        found[key] = next((written for written, _ in seen.values()), None)
        if len(seen) > 1:
            values = "; ".join(f"{written} ({', '.join(names)})" for written, names in seen.values())
            problems.append(
                f"evaluations that differ in {key} cannot be compared: {values}. Evaluate with the same {key}."
            )
    if problems:
        raise ConfigError(problems)
    return Setting(**found)


def comparison_rows(entries: Sequence[ComparedModel]) -> list[Row]:
    """The figures of each model, as JSON values; accuracies and bounds are fractions.

    Keys: model, parameters, images_per_second (None if unknown), dataset, split, n, norm, eps, clean, robust (attack ->
    figure, the same attacks for every model), strongest (the attack that harmonic_mean is taken with), harmonic_mean.
    A figure is {"value", "ci95", "attack_parameters"}, or None where it was not measured.

    Raises:
        ConfigError: see `common_setting`.
    """
    setting = common_setting(entries)
    attacks = _attacks(entries)
    rows = []
    for entry in entries:
        clean, strongest = entry.report.get("clean_accuracy"), entry.report.strongest()
        rows.append(
            {
                "model": entry.name,
                "parameters": entry.report.model.get("parameters"),
                "images_per_second": entry.report.images_per_second,
                "dataset": setting.dataset,
                "split": setting.split,
                "n": setting.n,
                "norm": setting.norm,
                "eps": setting.eps,
                "clean": _figure(clean),
                "robust": {attack: _figure(_robust(entry, attack)) for attack in attacks},
                "strongest": strongest.attack if strongest else None,
                "harmonic_mean": round(harmonic_mean(clean.value, strongest.value), 6) if clean and strongest else None,
            }
        )
    return rows


def pair_rows(entries: Sequence[ComparedModel]) -> list[Row]:
    """Each pair of models, clean (attack None) and under every attack that both have verdicts of, as JSON values.

    Keys: first, second, attack, both, only_first, only_second, neither, p_value. Models without verdicts, or with
    verdicts on other images, are left out.
    """
    rows = []
    for first, second in combinations(entries, 2):
        if first.verdicts is None or second.verdicts is None or not same_images(first.verdicts, second.verdicts):
            continue
        shared = first.verdicts.broken_by.keys() & second.verdicts.broken_by.keys()
        for attack in (None, *(attack for attack in _attacks([first, second]) if attack in shared)):
            counts = compare_pairs(first.verdicts, second.verdicts, attack)
            names = {"first": first.name, "second": second.name, "attack": attack}
            rows.append(names | dataclasses.asdict(counts) | {"p_value": counts.p_value})
    return rows


def comparison_table(entries: Sequence[ComparedModel]) -> str:
    """A line that says what was measured, one Markdown table, and notes on what makes its figures hard to compare.

    Raises:
        ConfigError: see `common_setting`.
    """
    table = markdown_table(_cells(entries, escape_markdown, lambda cell: f"**{cell}**"))
    notes = [f"- {escape_markdown(note)}" for note in _notes(entries)]
    return "\n\n".join([escape_markdown(_caption(entries)), table, *(["\n".join(notes)] if notes else [])])


def plain_table(entries: Sequence[ComparedModel]) -> str:
    """`comparison_table` for a terminal: a star marks the best of a column.

    Raises:
        ConfigError: see `common_setting`.
    """
    cells = _cells(entries, one_line, lambda cell: "*" + cell)
    star = ["*: best of the column"] if any(cell.startswith("*") for row in cells[1:] for cell in row[1:]) else []
    notes = [one_line(note) for note in _notes(entries)]
    return "\n".join([one_line(_caption(entries)), aligned_table(cells), *star, *notes])


def comparison_markdown(entries: Sequence[ComparedModel]) -> str:
    """The whole document: table, notes, pairs, and what the checks of each model warn of.

    Raises:
        ConfigError: see `common_setting`.
    """
    blocks = ["# Comparison", comparison_table(entries)]
    if pairs := pair_rows(entries):
        header = ["models", "figure", "both right", "only the first", "only the second", "neither", "p"]
        lines = [
            [
                f"{escape_markdown(row['first'])} / {escape_markdown(row['second'])}",
                escape_markdown(_title([e for e in entries if e.name in (row["first"], row["second"])], row["attack"])),
                *(f"{row[key]:,}" for key in ("both", "only_first", "only_second", "neither")),
                _p_text(row["p_value"]),
            ]
            for row in pairs
        ]
        blocks += [
            "## Pairs",
            "Images that both, only one or neither of two models classify correctly. p is McNemar's exact two-sided "
            "test on the images where the two differ, not corrected for the number of comparisons.",
            markdown_table([header, *lines]),
        ]
    if any(entry.report.warnings for entry in entries):
        blocks += ["## Warnings", "Signs that a figure may be too high, or that something is wrong with it."]
        blocks += [
            f"{escape_markdown(entry.name)}:\n\n"
            + "\n".join(f"- {escape_markdown(f'{check.name}: {check.finding}')}" for check in entry.report.warnings)
            for entry in entries
            if entry.report.warnings
        ]
    return "\n\n".join(blocks) + "\n"


def comparison_json(entries: Sequence[ComparedModel]) -> str:
    """The same as JSON, stable in order.

    Raises:
        ConfigError: see `common_setting`.
    """
    data = {"format": FORMAT_VERSION, "models": comparison_rows(entries), "pairs": pair_rows(entries)}
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def _attacks(entries: Sequence[ComparedModel]) -> list[str]:
    """From weak to strong; those of a cascade after each other, as they ran."""
    found: dict[str, int] = {}
    for row in (row for entry in entries for row in entry.report.results):
        if row.attack:
            found[row.attack] = max(found.get(row.attack, 0), len(row.attack_parameters.get("after") or ()))
    return sorted(found, key=lambda attack: (found[attack], attack_rank(attack)))


def _title(entries: Sequence[ComparedModel], attack: str | None) -> str:
    """With restarts and the attacks of a cascade before it, where they are the same for all; else `_notes` tells."""
    if attack is None:
        return "clean"
    titles = {result_title(row) for entry in entries if (row := _robust(entry, attack))}
    return titles.pop() if len(titles) == 1 else attack_title(attack)


def _robust(entry: ComparedModel, attack: str) -> Result | None:
    return entry.report.get("robust_accuracy", attack=attack)


def _figure(result: Result | None) -> Row | None:
    if result is None:
        return None
    bounds = wilson_interval(result.correct, result.n)
    return {
        "value": round(result.value, 6),
        "ci95": [round(bound, 6) for bound in bounds],
        "attack_parameters": result.attack_parameters,
    }


def _caption(entries: Sequence[ComparedModel]) -> str:
    return f"Accuracy on {common_setting(entries).title()}, 95 % intervals in brackets"


def _cells(entries: Sequence[ComparedModel], show: Callable[[str], str], mark: Callable[[str], str]) -> list[list[str]]:
    """The table without its rule, header first: ``show`` makes a user's text harmless, ``mark`` marks the best."""
    attacks = _attacks(entries)
    rows = comparison_rows(entries)
    header = [
        "model",
        "clean",
        *(show(_title(entries, name)) for name in attacks),
        "harmonic mean",
        "parameters",
        "images/s",
    ]
    columns = [[show(entry.name) or "unnamed" for entry in entries]]
    for name in (None, *attacks):
        results = [_robust(e, name) if name else e.report.get("clean_accuracy") for e in entries]
        alike = len({result_title(row) for row in results if row}) < 2
        best = _best([row.value if row else None for row in results]) if alike else set()
        columns.append(
            [
                cell.replace(value, mark(value), 1) if row is not None and i in best else cell
                for i, row in enumerate(results)
                for cell in [accuracy_cell(row)]
                for value in [cell.split(" [")[0]]
            ]
        )
    # means with different attacks, speeds on different machines: no best one
    means = [row["harmonic_mean"] for row in rows]
    titles = {result_title(row) for entry in entries if (row := entry.report.strongest())}
    best = _best(means) if len(titles) < 2 else set()
    columns.append(_marked([MISSING if m is None else f"{100 * m:.1f} %" for m in means], best, mark))
    sizes = [row["parameters"] for row in rows]
    columns.append(_marked([_size_text(size) for size in sizes], _best(sizes, smallest=True), mark))
    speeds = [row["images_per_second"] for row in rows]
    best = _best(speeds) if len({entry.report.hardware for entry in entries}) < 2 else set()
    columns.append(_marked([_speed_text(speed) for speed in speeds], best, mark))
    return [header, *(list(line) for line in zip(*columns, strict=True))]


def _marked(cells: Sequence[str], best: set[int], mark: Callable[[str], str]) -> list[str]:
    return [mark(cell) if i in best else cell for i, cell in enumerate(cells)]


def _best(values: Sequence[float | None], *, smallest: bool = False) -> set[int]:
    """Where the best value is, ties included; nowhere if there is nothing to compare it with."""
    known = [value for value in values if value is not None]
    if len(known) < 2 or len(set(known)) < 2:
        return set()
    best = min(known) if smallest else max(known)
    return {i for i, value in enumerate(values) if value == best}


def _size_text(count: int | None) -> str:
    if count is None:
        return MISSING
    if count >= 999_950:
        return f"{count / 1e6:,.1f} M"
    return f"{count / 1e3:.1f} k" if count >= 1000 else str(count)


def _speed_text(speed: float | None) -> str:
    if speed is None:
        return MISSING
    return f"{speed:,.0f}" if speed >= 100 else f"{speed:.1f}"


def _p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _notes(entries: Sequence[ComparedModel]) -> list[str]:
    """What differs between the evaluations and makes their figures harder to compare, a sentence each."""
    notes = []

    def differing(what: str, values: Iterable[tuple[str, Any]]) -> None:
        groups: dict[str, list[str]] = {}
        for name, value in values:
            groups.setdefault(str(value), []).append(name)
        if len(groups) > 1:
            notes.append(f"{what}: " + "; ".join(f"{value} ({', '.join(names)})" for value, names in groups.items()))

    differing("precision differs", ((e.name, e.report.precision) for e in entries))
    differing("image size differs", ((e.name, _size(e.report)) for e in entries))
    differing("hardware differs, so do not compare speeds", ((e.name, e.report.hardware or "unknown") for e in entries))
    strongest = [(e.name, row) for e in entries if (row := e.report.strongest())]
    differing(
        "the harmonic mean is of clean accuracy and different attacks",
        ((name, result_title(row)) for name, row in strongest),
    )
    for attack in _attacks(entries):
        rows = [(e.name, row) for e in entries if (row := _robust(e, attack))]
        differing(f"{attack_title(attack)} was run differently", ((name, _parameters_text(row)) for name, row in rows))
    base = next((entry for entry in entries if entry.verdicts is not None), None)
    for entry in entries:
        both = (base.verdicts if base else None), entry.verdicts
        if base and both[0] and both[1] and not same_images(both[0], both[1]):
            notes.append(f"{entry.name} was evaluated on other images than {base.name}: not compared image by image")
    return notes


def _size(report: EvalReport) -> str:
    size = report.preprocessing.get("size")
    return "x".join(str(side) for side in size) + " px" if isinstance(size, (list, tuple)) else "images as they are"


def _parameters_text(row: Result) -> str:
    """What decides how strong an attack is, as text."""
    values = row.attack_parameters
    text = [f"{key.replace('_', ' ')} {values[key]}" for key in ("steps", "step_size", "restarts") if key in values]
    if parts := [part["name"] for part in values.get("parts", [])]:
        text.append("parts " + " ".join(parts))
    if values.get("after"):
        text.append("on what was left by " + " ".join(values["after"]))
    return ", ".join(text) or "settings unknown"
