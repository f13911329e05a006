"""Measured figures and their file, `results.json`: written and read here alone. No torch."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1


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
    ``attack_parameters`` hold steps, step size and restarts.
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
class EvalReport:
    """What an evaluation found: the model's figures, its teacher's for comparison, and how they were made."""

    results: list[Result]
    teacher_results: list[Result] = field(default_factory=list)
    precision: str = "fp32"
    preprocessing: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    hardware: str = ""

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
        }
        return json.dumps(data, indent=2) + "\n"

    def get(self, metric: str, *, teacher: bool = False) -> Result | None:
        """The first result of that metric, of the model or of its teacher."""
        rows = self.teacher_results if teacher else self.results
        return next((row for row in rows if row.metric == metric), None)


def read_results(path: Path) -> EvalReport:
    """Read a `results.json`.

    Raises:
        ValueError: not a results file of a format this version knows.
    """
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict) or data.get("format") != FORMAT_VERSION:
        raise ValueError(f"{path} is not a results file of format {FORMAT_VERSION}")
    names = {f.name for f in dataclasses.fields(Result)}

    def rows(key: str) -> list[Result]:
        return [Result(**{name: entry[name] for name in names}) for entry in data[key]]

    context = {key: data[key] for key in ("precision", "preprocessing", "versions", "hardware")}
    return EvalReport(results=rows("results"), teacher_results=rows("teacher_results"), **context)


def harmonic_mean(clean: float, robust: float) -> float:
    """2ab / (a + b) of two accuracies as fractions; 0 if both are 0. The score that picks the best weights."""
    return 2 * clean * robust / (clean + robust) if clean + robust > 0 else 0.0


def results_table(report: EvalReport, teacher_name: str, student_name: str, *, markdown: bool = False) -> str:
    """A small table, a row a model and a column a metric, accuracies in per cent with their 95 % intervals."""
    columns = report.results
    header = ["model"] + [column_title(result) for result in columns]
    lines = []
    for name, rows in ((teacher_name, report.teacher_results), (student_name, report.results)):
        if rows:
            lines.append([name] + [_cell(result) for result in rows])
    if markdown:
        rule = ["---"] + ["---:"] * len(columns)
        return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *lines])
    widths = [max(len(row[i]) for row in [header, *lines]) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, *lines]
    )


def column_title(result: Result) -> str:
    """``clean`` or ``PGD-20 (linf 8/255)``."""
    if result.attack is None:
        return "clean"
    return f"{result.attack.upper()} ({result.norm} {result.eps})"


def _cell(result: Result) -> str:
    low, high = wilson_interval(result.correct, result.n)
    return f"{100 * result.value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
