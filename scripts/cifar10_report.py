"""Tables and figures of docs/results.md, from the results.json files in docs/evidence/ and from nothing else."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar10_suites import PAPERS, SHORT, SUITES, VARIANTS
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from arrest_hub.figures import COLOURS, DARK, DPI, GREY
from arrest_hub.results import harmonic_mean, wilson_interval

BEGIN, END = "<!-- {0}: made by scripts/reproduce_cifar10.py --report -->", "<!-- end of {0} -->"


@dataclass(frozen=True)
class Row:
    """A run: counts of right images by attack ("clean", "pgd-20", "apgd", "autoattack"), and how it was trained."""

    seed: int
    counts: dict[str, tuple[int, int]]
    run: dict[str, Any]
    hardware: str = ""
    """What it was trained on; of rows kept without it, what it was evaluated on."""

    def share(self, attack: str) -> float | None:
        """The accuracy as a fraction; None where it is not measured."""
        if attack not in self.counts:
            return None
        correct, n = self.counts[attack]
        return correct / n

    def harmonic(self, attack: str) -> float | None:
        """Harmonic mean of clean accuracy and accuracy under an attack; None where that is not measured."""
        clean, robust = self.share("clean"), self.share(attack)
        return None if clean is None or robust is None else harmonic_mean(clean, robust)


def read_row(folder: Path) -> Row:
    """A run's folder under docs/evidence/."""
    report = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    results = report["results"]
    counts = {result["attack"] or "clean": (result["correct"], result["n"]) for result in results}
    if (left := left_by_apgd(results)) is not None:
        counts["apgd"] = left
    run = folder / "run.json"
    seed = folder.name.rpartition("-seed-")[2]
    facts = json.loads(run.read_text()) if run.is_file() else {}
    return Row(int(seed) if seed.isdigit() else 0, counts, facts, facts.get("hardware") or report.get("hardware", ""))


def left_by_apgd(results: Sequence[Mapping[str, Any]]) -> tuple[int, int] | None:
    """Images that APGD-CE and then APGD-T leave right, and of how many: AutoAttack's first two parts, or these two
    alone after PGD. None where neither was run."""
    by_attack = {result["attack"]: result for result in results}
    if whole := by_attack.get("autoattack"):
        parts = whole.get("attack_parameters", {}).get("parts", [])
        broken_later = sum(part["broken"] for part in parts if not part["name"].startswith("apgd-"))
        return (whole["correct"] + broken_later, whole["n"]) if parts else None
    half = by_attack.get("apgd-t")
    if half is None or "apgd-ce" not in half["attack_parameters"].get("after", []):
        return None
    return half["correct"], half["n"]


def read_suite(folder: Path) -> dict[str, list[Row]]:
    """By variant, the runs of a suite, in the order of the seeds."""
    found = {
        key: [read_row(folder / name) for seed in variant.seeds if (folder / (name := f"{key}-seed-{seed}")).is_dir()]
        for key, variant in VARIANTS.items()
    }
    return {key: rows for key, rows in found.items() if rows}


def spread(values: Sequence[float | None], digits: int = 1) -> str:
    """Per cent: the mean, and in brackets the smallest and the largest where there are several; "–" for none."""
    known = [100 * value for value in values if value is not None]
    if not known:
        return "–"
    text = f"{statistics.mean(known):.{digits}f}"
    return text if len(known) == 1 else f"{text} ({min(known):.{digits}f}–{max(known):.{digits}f})"


def hardware_marks(rows: Mapping[str, Sequence[Row]]) -> dict[str, str]:
    """A mark behind minutes for each machine of a suite: none for that of most runs, then *, ** and so on."""
    places = Counter(run.hardware for runs in rows.values() for run in runs).most_common()
    return {place: "*" * number for number, (place, _) in enumerate(places)}


def minutes_text(runs: Sequence[Row], marks: Mapping[str, str]) -> str:
    """Mean minutes by machine, each with its mark: times of two machines have no mean."""
    times = {mark: [run.run["train_minutes"] for run in runs if run.hardware == place] for place, mark in marks.items()}
    return ", ".join(f"{statistics.mean(minutes):.1f}{mark}" for mark, minutes in times.items() if minutes)


def table(rows: Mapping[str, Sequence[Row]], keys: Iterable[str]) -> list[str]:
    """A line for each variant that was run."""
    lines = [
        "| | seeds | clean | PGD-20 | APGD | AutoAttack | H (PGD-20) | H (APGD) | H (AutoAttack) | passes | minutes "
        "| runs |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: | --- |",
    ]
    for key in keys:
        if key not in rows:
            continue
        runs = rows[key]
        shares = [spread([run.share("clean") for run in runs])]
        means = []
        for attack in ("pgd-20", "apgd", "autoattack"):
            attacked = [run for run in runs if attack in run.counts]
            few = f" of {len(attacked)}" if 0 < len(attacked) < len(runs) else ""
            shares.append(spread([run.share(attack) for run in attacked]) + few)
            means.append(spread([run.harmonic(attack) for run in attacked]))
        minutes = minutes_text(runs, hardware_marks(rows))
        lines.append(
            f"| {VARIANTS[key].title} | {len(runs)} | {' | '.join(shares + means)} "
            f"| {runs[0].run['passes']} | {minutes} | `{key}` |"
        )
    return lines


def hardware_text(rows: Mapping[str, Sequence[Row]]) -> list[str]:
    """What stars behind minutes mean; nothing where all runs were made on one machine."""
    usual, *others = ((place, mark.replace("*", "\\*")) for place, mark in hardware_marks(rows).items())
    texts = "".join(f"; with {mark}, of {place}" for place, mark in others)
    return [f"Minutes are of {usual[0]}{texts}.", ""] if others else []


def apgd_text(rows: Mapping[str, Sequence[Row]]) -> list[str]:
    """How far APGD stands for AutoAttack: what the other two attacks broke where all four were run."""
    both = [run.counts for runs in rows.values() for run in runs if {"apgd", "autoattack"} <= set(run.counts)]
    if not both:
        return []
    left = sum(counts["apgd"][0] for counts in both)
    broken = left - sum(counts["autoattack"][0] for counts in both)
    return [
        f"APGD is the first half of standard AutoAttack, APGD-CE and then APGD-T; alone, on what PGD-20 left. Of the "
        f"{left:,} images that it left on {len(both)} network{'s' * (len(both) > 1)}, the other half, FAB-T and "
        f"Square, broke {broken:,}.",
        "",
    ]


SWEPT = ("best", "aft", "trades", "at")
"""Variants whose learning rate is swept."""


def by_method_and_rate(key: str) -> tuple[int, float]:
    """Where a variant of a CPU's suite stands in the table of learning rates."""
    return SWEPT.index(key.partition("-lr-")[0]), float(VARIANTS[key].flags.get("lr", SHORT["lr"]))


def in_table(group: str) -> list[str]:
    """The variants of a group, beside those that they are compared with, in the order of the table."""
    keys = [key for key, variant in VARIANTS.items() if variant.group == group]
    match group:
        case "main":
            return keys
        case "recipe":
            return ["best", *keys]
        case "lambda":  # the recipe is the sweep's λ 100
            return ["arrest", *keys[: keys.index("lambda-300")], "best", *keys[keys.index("lambda-300") :]]
        case "lr":
            return sorted((*SWEPT, *keys), key=by_method_and_rate)
        case "precision":  # each below its own in bf16
            return [name for key in keys for name in (key.removesuffix("-fp32"), key)]
        case "parts":  # what they are added to comes first
            added_to = ["trades-lr-0.04-fp32", "aft-lr-0.04-fp32", "best-lr-0.04-no-replay-fp32", "best-lr-0.04-fp32"]
            return [*added_to, *(key for key in keys if key not in added_to)]
        case _:
            return ["arrest", *keys]


def suite_text(name: str, folder: Path) -> list[str]:
    """The tables of a suite."""
    rows = read_suite(folder)
    lines = apgd_text(rows) + hardware_text(rows)
    titles = {
        "main": "Methods", "ablation": "Ingredients, each added to ARREST",
        "recipe": "Added to the recipe (λ 100), or changed in it", "choices": "What was chosen",
        "lambda": "λ", "tau": "τ", "lr": "Learning rate, 0.02 where not said",
        "precision": "Precision of the training, bf16 where not said",
        "parts": "Part by part at a learning rate of 0.04, in fp32",
    }  # fmt: skip
    shown = {group: {key for key in in_table(group) if key in rows} for group in titles}
    for group, title in titles.items():
        told = any(shown[group] < other for other in shown.values())  # all of it stands in another table
        if not told and any(VARIANTS[key].group == group for key in shown[group]):
            lines += [f"**{title}**", "", *table(rows, in_table(group)), ""]
    return lines


def write_report(evidence: Path, docs: Path) -> None:
    """Replace the generated parts of docs/results.md, and draw docs/figures/{tradeoff,drift}.png.

    Raises ValueError if a part has no place in docs/results.md.
    """
    path = docs / "results.md"
    text = path.read_text(encoding="utf-8")
    for name in SUITES:
        if not (evidence / name).is_dir():
            continue
        begin, end = BEGIN.format(name), END.format(name)
        if begin not in text or end not in text:
            raise ValueError(f"{path} has no place for the suite {name!r}: add the lines {begin} and {end}.")
        before, _, rest = text.partition(begin)
        text = "\n".join([before + begin, "", *suite_text(name, evidence / name), end + rest.partition(end)[2]])
    path.write_text(text, encoding="utf-8")
    suites = {name: read_suite(evidence / name) for name in SUITES if (evidence / name).is_dir()}
    if suites.get("narrow"):
        draw_tradeoff(docs / "figures" / "tradeoff.png", suites)
        draw_drift(docs / "figures" / "drift.png", suites["narrow"])


def draw_tradeoff(path: Path, suites: Mapping[str, Mapping[str, Sequence[Row]]]) -> None:
    """Clean against robust accuracy: the narrow network's methods and sweeps under APGD, then, a panel for each of the
    paper's networks, what is published under AutoAttack, and ours where it is measured."""
    figure = Figure(figsize=(10.5, 8), layout="constrained")
    methods, sweeps, *published = figure.subplots(2, 2).flat
    draw_methods(methods, suites["narrow"])
    draw_sweeps(sweeps, suites["narrow"])
    for axes, (name, points) in zip(published, PAPERS.items(), strict=True):
        draw_published(axes, SUITES[name].title, points, suites.get(name, {}))
    save(figure, path)


def draw_methods(axes: Axes, narrow: Mapping[str, Sequence[Row]]) -> None:
    """The narrow network: a point for each seed of a method."""
    colours = {"at": GREY, "trades": COLOURS[3], "aft": COLOURS[1], "arrest": COLOURS[0], "best": DARK}
    for key, colour in colours.items():
        if key in narrow:
            draw_points(axes, narrow[key], "apgd", VARIANTS[key].title, colour)
    title = f"{SUITES['narrow'].title}: methods"
    axes.set(title=title, xlabel="clean accuracy (%)", ylabel="under APGD (%)")


def draw_sweeps(axes: Axes, narrow: Mapping[str, Sequence[Row]]) -> None:
    """The narrow network: a curve for each sweep, of one seed."""
    curves = {
        "λ (τ 0.25)": (["lambda-3", "arrest", "lambda-30", "best", "lambda-300"], COLOURS[0], "o", (9, 18)),
        "τ (λ 10)": (["tau-0.15", "tau-0.20", "arrest", "tau-0.30", "rgkd"], COLOURS[2], "s", (-26, -13)),
        "learning rate (λ 100)": (["best", "best-lr-0.04", "best-lr-0.08"], COLOURS[3], "^", (9, 20)),
        "learning rate (AFT)": (["aft", "aft-lr-0.04", "aft-lr-0.08", "aft-lr-0.16"], COLOURS[1], "v", (-16, -16, 9)),
    }
    for label, (keys, colour, marker, heights) in curves.items():
        points = {key: point for key in keys if (point := first_point(narrow.get(key, ()), "apgd")) is not None}
        if len(points) > 1:
            axes.plot(*zip(*points.values(), strict=True), color=colour, marker=marker, linewidth=1.2, label=label)
            for number, (key, point) in enumerate(points.items()):
                if (key == "arrest" and marker != "o") or (key == "best" and marker == "^"):
                    continue  # on two curves, named once
                titled = VARIANTS[key].title.rpartition(", ")[2]
                name = {"arrest": "λ 10", "best": "λ 100", "rgkd": "no replay"}.get(key, titled)
                place = (0, heights[number % len(heights)])  # several, since neighbours are close
                axes.annotate(name, point, place, textcoords="offset points", ha="center", fontsize=8, color=colour)
    axes.margins(x=0.08, y=0.2)
    axes.set(title=f"{SUITES['narrow'].title}: sweeps, seed 0", xlabel="clean accuracy (%)", ylabel="under APGD (%)")


def draw_published(
    axes: Axes, title: str, points: Mapping[str, tuple[float, float]], ours: Mapping[str, Sequence[Row]]
) -> None:
    """What others report for a network, and our runs that were attacked with AutoAttack."""
    for name, (clean, robust) in points.items():
        axes.plot(clean, robust, "x" if name != "ARREST" else "*", color=COLOURS[1] if name == "ARREST" else GREY)
        axes.annotate(name, (clean, robust), (4, 4), textcoords="offset points", fontsize=7, color=DARK)
    measured = {key: runs for key, runs in ours.items() if any("autoattack" in run.counts for run in runs)}
    for key, runs in measured.items():
        draw_points(axes, runs, "autoattack", VARIANTS[key].title, COLOURS[0])
    axes.margins(x=0.25, y=0.15)
    state = "published, and ours" if measured else "published"
    axes.set(title=f"{title}: {state}", xlabel="clean accuracy (%)", ylabel="under AutoAttack (%)")


def first_point(rows: Sequence[Row], attack: str) -> tuple[float, float] | None:
    """Per cent: clean, and under the attack, of the first seed; None where that is not measured."""
    clean, robust = (rows[0].share("clean"), rows[0].share(attack)) if rows else (None, None)
    return None if clean is None or robust is None else (100 * clean, 100 * robust)


def draw_points(axes: Axes, rows: Sequence[Row], attack: str, label: str, colour: str) -> None:
    """A point for each seed, with the 95 % interval of its robust accuracy."""
    for number, row in enumerate(row for row in rows if attack in row.counts):
        low, high = wilson_interval(*row.counts[attack])
        x, y = 100 * (row.share("clean") or 0.0), 100 * (row.share(attack) or 0.0)
        axes.errorbar(
            x, y, yerr=[[y - 100 * low], [100 * high - y]], fmt="D", color=colour, markersize=4, elinewidth=0.7,
            alpha=0.8, label=label if not number else None,
        )  # fmt: skip


def draw_drift(path: Path, rows: Mapping[str, Sequence[Row]]) -> None:
    """Drift and replay rate over the training, of those runs that were logged with them."""
    figure = Figure(figsize=(9.5, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (key, label), colour in zip(
        {"arrest": "λ 10, τ 0.25", "lambda-3": "λ 3, τ 0.25", "lambda-30": "λ 30, τ 0.25", "tau-0.15": "λ 10, τ 0.15",
         "best": "the recipe"}.items(), COLOURS, strict=False,
    ):  # fmt: skip
        log = rows[key][0].run["log"] if key in rows else []
        log = [line for line in log if "drift_p50" in line]
        if not log:
            continue
        steps = [line["step"] for line in log]
        left.plot(steps, [line["drift_p50"] for line in log], color=colour, linewidth=1.2, label=label)
        left.plot(steps, [line["drift_p90"] for line in log], color=colour, linewidth=0.8, linestyle=":")
        right.plot(steps, [100 * line["replay_rate"] for line in log], color=colour, linewidth=1.2, label=label)
    left.set(xlabel="optimizer step", ylabel="drift (share of π)", title="drift: median, and 90 % quantile dotted")
    right.set(xlabel="optimizer step", ylabel="replayed (%)", title="replay rate", ylim=(0, None))
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Dress the panels alike and write the figure."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#dddddd", linewidth=0.6)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
