"""Measured figures and their file, `results.json`: written and read here alone. No torch."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from arrest_hub.files import write_whole

FORMAT_VERSION = 1
MISSING = "–"
"""Stands in tables for what was not measured."""
CHANCE = "clean accuracy above chance"
"""The check that is of clean accuracy alone."""
TRANSFER = "white-box beats transfer from the teacher"
"""The check that is of the teacher too."""


def wilson_interval(successes: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927, J. Amer. Statist. Assoc. 22, 209-212), as fractions.

    Raises:
        ValueError: n is not positive, or successes not within 0..n.
    """
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"{successes} of {n} is no proportion")
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else centre - half  # exact, where rounding would miss the ends
    return low, 1.0 if successes == n else centre + half


@dataclass
class Result:
    """One figure: how many of ``n`` images were classified correctly, clean or under one attack.

    ``metric`` is "clean_accuracy" or "robust_accuracy"; ``eps`` is the fraction as typed, on pixels in [0, 1];
    ``attack_parameters`` hold steps, step size and restarts, and for AutoAttack the parts that ran with theirs.
    ``seconds`` is the time of the batches, divided by the number of processes that shared them.
    """

    metric: str
    attack: str | None
    norm: str | None
    eps: str | None
    correct: int
    n: int
    dataset: str
    split: str
    seed: int
    seconds: float
    attack_parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def value(self) -> float:
        """The accuracy as a fraction."""
        return self.correct / self.n

    def to_dict(self) -> dict[str, Any]:
        """The entry of `results.json`: the fields, plus ``value`` and its interval ``ci95``."""
        entry = dataclasses.asdict(self)
        entry["value"] = round(self.value, 6)
        entry["ci95"] = [round(bound, 6) for bound in wilson_interval(self.correct, self.n)]
        entry["seconds"] = round(self.seconds, 3)
        return entry


@dataclass
class Check:
    """One sign of gradient masking, or of a mistake in the evaluation, looked for.

    ``status`` is "pass", "warn" or "skipped"; ``value`` is the figure it rests on (None if skipped), ``finding`` says
    in a sentence what was measured and, if it warns, what that may mean.
    """

    name: str
    status: str
    value: float | None
    finding: str


@dataclass
class CurvePoint:
    """Accuracy at one radius: ``eps`` as a fraction such as "2/255", ``correct`` of ``n`` images."""

    eps: str
    correct: int
    n: int


@dataclass
class EvalReport:
    """What an evaluation found: the model's figures, its teacher's for comparison, and how they were made.

    ``model`` says which network it was (id, revision, architecture, parameters, SHA-256 of the weights); ``eps_curve``
    holds the points of "student" and "teacher", or of "model" where there is no teacher; ``images_per_second`` is the
    speed of clean classification.
    """

    results: list[Result]
    teacher_results: list[Result] = field(default_factory=list)
    precision: str = "fp32"
    preprocessing: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    hardware: str = ""
    model: dict[str, Any] = field(default_factory=dict)
    images_per_second: float | None = None
    checks: list[Check] = field(default_factory=list)
    eps_curve: dict[str, list[CurvePoint]] = field(default_factory=dict)

    def to_json(self) -> str:
        """`results.json`, stable in order."""
        data = {
            "format": FORMAT_VERSION,
            "results": [result.to_dict() for result in self.results],
            "teacher_results": [result.to_dict() for result in self.teacher_results],
            "precision": self.precision,
            "preprocessing": self.preprocessing,
            "versions": self.versions,
            "hardware": self.hardware,
            "model": self.model,
            "images_per_second": self.images_per_second,
            "checks": [dataclasses.asdict(check) for check in self.checks],
            "eps_curve": {name: [dataclasses.asdict(p) for p in points] for name, points in self.eps_curve.items()},
        }
        return json.dumps(data, indent=2, ensure_ascii=False) + "\n"

    def write(self, path: Path) -> None:
        """Write `results.json`, whole or not at all."""
        write_whole(path, self.to_json())

    def get(self, metric: str, *, attack: str | None = None, teacher: bool = False) -> Result | None:
        """The first result of that metric (under that attack, if given), of the model or of its teacher.

        Of several robust accuracies on the images of the clean one, at the first of their radii, it is the lowest one,
        of two that are alike the stronger attack's. What noise leaves is no robustness, and is had by
        ``attack="noise"`` alone.
        """
        rows = [row for row in (self.teacher_results if teacher else self.results) if row.metric == metric]
        if attack is not None or metric != "robust_accuracy":
            return next((row for row in rows if attack in (None, row.attack)), None)
        rows = [row for row in rows if row.attack != "noise"]
        clean = self.get("clean_accuracy", teacher=teacher)
        rows = [row for row in rows if clean and (row.dataset, row.split) == (clean.dataset, clean.split)] or rows
        alike = [row for row in rows if _place(row) == _place(rows[0])]
        alike.sort(key=lambda row: attack_rank(row.attack), reverse=True)
        return min(alike, key=lambda row: row.value, default=None)

    def strongest(self) -> Result | None:
        """The robust accuracy that the harmonic mean is taken with."""
        return self.get("robust_accuracy")

    @property
    def warnings(self) -> list[Check]:
        """The checks that warn."""
        return [check for check in self.checks if check.status == "warn"]


def read_results(path: Path) -> EvalReport:
    """Read a `results.json`.

    Raises:
        ValueError: not a results file of a format this version knows, or one that lacks something.
    """
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict) or data.get("format") != FORMAT_VERSION:
        raise ValueError(f"{path} is not a results file of format {FORMAT_VERSION}")
    names = {f.name for f in dataclasses.fields(Result)}

    def rows(key: str) -> list[Result]:
        found = [Result(**{name: entry[name] for name in names}) for entry in data[key]]
        for row in found:
            if not (type(row.correct) is type(row.n) is int and 0 <= row.correct <= row.n and row.n > 0):
                raise ValueError(f"{path} is a damaged results file: {row.correct!r} of {row.n!r} images")
        return found

    plain = ("precision", "preprocessing", "versions", "hardware", "model", "images_per_second")
    try:
        return EvalReport(
            results=rows("results"),
            teacher_results=rows("teacher_results"),
            checks=[_read_check(check) for check in data["checks"]],
            eps_curve={name: [CurvePoint(**p) for p in points] for name, points in data["eps_curve"].items()},
            **{key: data[key] for key in plain},
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is a damaged results file: {type(error).__name__} {error}") from error


def _read_check(values: dict[str, Any]) -> Check:
    check = Check(**values)
    if check.status not in ("pass", "warn", "skipped"):
        raise TypeError(f"status {check.status!r}")
    return check


def merge_reports(old: EvalReport, new: EvalReport) -> EvalReport:
    """``new`` over ``old``: a figure of the same attack, radius, dataset and split is replaced, the others are kept.

    Only figures of the same weights may be put together; the caller makes sure of it.
    """

    def merged(before: list[Result], after: list[Result]) -> list[Result]:
        known = {_key(row) for row in after}
        kept = [row for row in before if _key(row) not in known]
        return sorted(kept + after, key=lambda row: attack_rank(row.attack))

    report = dataclasses.replace(
        new,
        results=merged(old.results, new.results),
        teacher_results=merged(old.teacher_results, new.teacher_results),
        checks=_merged_checks(old.checks, new.checks),
        eps_curve=new.eps_curve or old.eps_curve,
        images_per_second=old.images_per_second if new.images_per_second is None else new.images_per_second,
    )
    report.model = old.model | new.model
    return report


def attack_rank(attack: str | None) -> tuple[int, int, str]:
    """What sorts attacks from weak to strong: none, noise, PGD by its steps, AutoAttack's parts, AutoAttack."""
    if attack is None:
        return 0, 0, ""
    kind, _, steps = attack.partition("-")
    if kind == "pgd":
        return 2, int(steps) if steps.isdecimal() and len(steps) < 10 else 0, attack
    return {"noise": 1, "autoattack": 4}.get(attack, 3), 0, attack


def pgd_parameters(steps: int, step_size: float, restarts: int = 1) -> dict[str, Any]:
    """`Result.attack_parameters` of PGD: ``step_size`` on pixels in [0, 1], from a random start."""
    return {"steps": steps, "step_size": step_size, "restarts": restarts, "start": "uniform", "loss": "margin"}


def _merged_checks(old: list[Check], new: list[Check]) -> list[Check]:
    """Each check as it was last measured: one that was skipped, or not made, does not take an earlier finding away."""
    found = {check.name: check for check in old}
    found |= {check.name: check for check in new if check.status != "skipped" or check.name not in found}
    return list(found.values())


def radius(eps: str | None) -> Fraction | str | None:
    """The number that a radius is, however it is written: 0.5 is 1/2; what is no number stays as it is."""
    try:
        return None if eps is None else Fraction(eps)
    except (ValueError, ZeroDivisionError):
        return eps


def _key(row: Result) -> tuple[Any, ...]:
    return row.metric, row.attack, *_place(row)


def _place(row: Result) -> tuple[Any, ...]:
    """Where a figure was measured: radius and images."""
    return row.norm, radius(row.eps), row.dataset, row.split


def weaker_figures(old: Iterable[Result], new: Iterable[Result]) -> list[tuple[Result, Result]]:
    """Pairs of an earlier figure and one of the same attack, made in another way, that leaves more images standing."""
    before = {_key(row): row for row in old}
    pairs = [(before[_key(row)], row) for row in new if _key(row) in before]
    return [(a, b) for a, b in pairs if a.n == b.n and _strength(a) != _strength(b) and b.correct > a.correct]


def strength_text(row: Result) -> str:
    """``with 5 restarts and steps of 0.00784``: what its name does not tell of an attack."""
    restarts, step, before = _strength(row)
    steps = "" if step is None else f" and steps of {step:.3g}"
    after = f", after {', '.join(before)}" if before else ""
    return f"with {restarts} restart{'s' * (restarts != 1)}{steps}{after}"


def _strength(row: Result) -> tuple[Any, ...]:
    """What its name does not tell of an attack: restarts, step size, and the attacks of a cascade before it."""
    parameters = row.attack_parameters
    return parameters.get("restarts", 1), parameters.get("step_size"), tuple(parameters.get("after") or ())


def harmonic_mean(clean: float, robust: float) -> float:
    """2ab / (a + b) of two accuracies as fractions; 0 if both are 0. The score that picks the best weights."""
    return 2 * clean * robust / (clean + robust) if clean + robust > 0 else 0.0


def results_table(report: EvalReport, teacher_name: str, student_name: str, *, markdown: bool = False) -> str:
    """A small table, a row a model and a column a figure of the model, accuracies in per cent with 95 % intervals.

    A figure that the teacher lacks, or has of an attack of other strength, is a dash; one that only the teacher has is
    left out.
    """
    columns = report.results
    several = len({(row.dataset, row.split) for row in columns}) > 1
    titles = [column_title(row) + f" on {row.dataset} [{row.split}]" * several for row in columns]
    table = [["model", *titles]]
    for name, rows in ((teacher_name, report.teacher_results), (student_name, report.results)):
        if rows:
            known = {(_key(row), _strength(row)): row for row in rows}
            table.append([name, *(accuracy_cell(known.get((_key(row), _strength(row)))) for row in columns)])
    if markdown:
        return markdown_table([[escape_markdown(cell) for cell in row] for row in table])
    return aligned_table([[one_line(cell) for cell in row] for row in table])


def markdown_table(rows: list[list[str]]) -> str:
    """Rows of cells, the header first, as a Markdown table: first column to the left, the others to the right."""
    rule = ["---"] + ["---:"] * (len(rows[0]) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]])


def aligned_table(rows: list[list[str]]) -> str:
    """The same for a terminal."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def one_line(text: str) -> str:
    """``text`` on one line and without control characters: names come from users."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def escape_markdown(text: str) -> str:
    """``text`` so that Markdown shows it as it is, on one line, in a table too."""
    text = re.sub(r"([\\`*|<>~&]|\[(?=[^\]]*\]\())", r"\\\1", one_line(text))
    # underscores within words are no emphasis, and names are full of them
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\_", text)


def column_title(result: Result) -> str:
    """``clean``, or `result_title` and the radius: ``PGD-20 (linf 8/255)``."""
    return "clean" if result.attack is None else f"{result_title(result)} ({result.norm} {result.eps})"


def result_title(result: Result) -> str:
    """``clean``, ``PGD-20``, ``PGD-20 x5`` with restarts, and for a cascade ``Square after PGD-20``."""
    if result.attack is None:
        return "clean"
    restarts, before = result.attack_parameters.get("restarts", 1), result.attack_parameters.get("after")
    title = attack_title(result.attack) + (f" x{restarts}" if restarts > 1 else "")
    return title + (" after " + ", ".join(attack_title(name) for name in before) if before else "")


def attack_title(attack: str) -> str:
    """``AutoAttack``, ``noise``, ``PGD-20``, ``APGD-CE``: an attack as it is written in tables and figures."""
    return {"autoattack": "AutoAttack", "noise": "noise", "square": "Square"}.get(attack, attack.upper())


def accuracy_cell(result: Result | None) -> str:
    """``90.0 % [82.6, 94.5]``, or a dash for what was not measured."""
    if result is None:
        return MISSING
    low, high = wilson_interval(result.correct, result.n)
    return f"{100 * result.value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
