"""Figures of docs/results.md, from what is kept in docs/evidence/ and from nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from cifar10_evidence import Row
from cifar10_suites import PAPERS, SUITES, VARIANTS
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from arrest_hub.figures import COLOURS, DARK, DPI, GREY
from arrest_hub.results import wilson_interval

NARROW = "a quarter of the width"
METHODS = {"at": GREY, "trades": COLOURS[3], "aft": COLOURS[1], "arrest": COLOURS[0], "best": DARK}

Place = tuple[float, float]
SWEEPS: dict[str, dict[str, tuple[str, str, dict[str, tuple[str, Place]]]]] = {
    "λ and τ": {
        "λ (τ 0.25)": (COLOURS[0], "o", {
            "lambda-3": ("λ 3", (-3, -12)), "arrest": ("λ 10", (-16, -3)), "lambda-30": ("λ 30", (-16, 4)),
            "best": ("λ 100", (8, 7)), "lambda-300": ("λ 300", (-16, 7)),
        }),
        "τ (λ 10)": (COLOURS[2], "s", {
            "tau-0.15": ("τ 0.15", (-6, -13)), "tau-0.20": ("τ 0.20", (20, 2)), "arrest": ("", (0, 0)),
            "tau-0.30": ("τ 0.30", (-17, -9)), "rgkd": ("no replay", (-6, 7)),
        }),
    },
    "learning rate": {
        "the recipe": (DARK, "^", {
            "best": ("0.02", (0, -13)), "best-lr-0.04": ("0.04", (0, 7)), "best-lr-0.08": ("0.08", (0, 7)),
        }),
        "AFT": (COLOURS[1], "v", {
            "aft": ("0.02", (0, -13)), "aft-lr-0.04": ("0.04", (16, -3)), "aft-lr-0.08": ("0.08", (0, 7)),
            "aft-lr-0.16": ("0.16", (0, -13)),
        }),
    },
}  # fmt: skip
"""By panel and curve: colour, marker, and of each variant its name and where it stands, in points from its mark."""
PARTS: dict[str, tuple[str, Place]] = {
    "best-lr-0.04-ema-hold-fp32": ("averaged", (14, 6)), "best-lr-0.04-awp-fp32": ("AWP", (4, -13)),
    "best-lr-0.04-eps-spread-fp32": ("sample-wise eps", (-24, -13)),
    "best-lr-0.04-eps-10-fp32": ("eps 10/255", (-24, 6)), "best-lr-0.04-smoothing-fp32": ("smoothing", (8, 7)),
    "best-lr-0.04-frozen-head-fp32": ("frozen head", (0, -13)),
    "best-lr-0.04-augment-fp32": ("TrivialAugment", (0, -13)),
}  # fmt: skip
"""What is added to the recipe, likewise."""


def draw_tradeoff(path: Path, suites: Mapping[str, Mapping[str, Sequence[Row]]]) -> None:
    """Clean against robust accuracy: the narrow network's methods, sweeps and parts under APGD, then, a panel for each
    of the paper's networks, what is published under AutoAttack, and ours where it is measured."""
    figure = Figure(figsize=(12, 7.2), layout="constrained")
    methods, *sweeps, parts, first, second = figure.subplots(2, 3).flat
    draw_methods(methods, suites["narrow"])
    for axes, name in zip(sweeps, SWEEPS, strict=True):
        draw_sweeps(axes, name, suites["narrow"])
    draw_parts(parts, suites["narrow"])
    for axes, (name, points) in zip((first, second), PAPERS.items(), strict=True):
        draw_published(axes, SUITES[name].title, points, suites.get(name, {}))
    save(figure, path)


def draw_methods(axes: Axes, narrow: Mapping[str, Sequence[Row]]) -> None:
    """The narrow network: a point for each seed of a method."""
    for key, colour in METHODS.items():
        if key in narrow:
            draw_points(axes, narrow[key], "apgd", VARIANTS[key].title, colour)
    name_panel(axes, f"{NARROW}: methods", "APGD")


def draw_sweeps(axes: Axes, panel: str, narrow: Mapping[str, Sequence[Row]]) -> None:
    """The narrow network: a curve for each sweep of a panel, of one seed."""
    for title, (colour, marker, names) in SWEEPS[panel].items():
        points = {key: point for key in names if (point := point_of(narrow.get(key, ()), 0, "apgd")) is not None}
        if len(points) > 1:
            axes.plot(*zip(*points.values(), strict=True), color=colour, marker=marker, linewidth=1.2, label=title)
            for key, point in points.items():
                write(axes, *names[key], point, colour)
    axes.margins(0.2, 0.14)
    name_panel(axes, f"{NARROW}: {panel}, seed 0", "APGD")


def draw_parts(axes: Axes, narrow: Mapping[str, Sequence[Row]]) -> None:
    """The narrow network: from AFT to the recipe, and from there to what is added; of the seed that all of them have,
    and in grey the others of AFT and of the recipe."""
    recipe = "best-lr-0.04-fp32"
    steps = {"aft-lr-0.04-fp32": ("AFT", (0, -13)), "best-lr-0.04-no-replay-fp32": ("+ RGKD", (-8, 7)),
             recipe: ("+ replay:\nthe recipe", (32, -21))}  # fmt: skip
    path = {key: point for key in steps if (point := point_of(narrow.get(key, ()), 1, "apgd")) is not None}
    if not path:
        return
    for key in ("aft-lr-0.04-fp32", recipe):
        for seed in (0, 2):
            if (other := point_of(narrow.get(key, ()), seed, "apgd")) is not None:
                axes.plot(*other, "o", color=GREY, markersize=3.5, alpha=0.6, zorder=1)
    axes.plot(*zip(*path.values(), strict=True), color=DARK, marker="D", markersize=4, linewidth=1.2)
    for key, point in path.items():
        write(axes, *steps[key], point, DARK)
    for key, (name, place) in PARTS.items():
        point = point_of(narrow.get(key, ()), 1, "apgd")
        if point is not None and recipe in path:
            axes.plot(*zip(path[recipe], point, strict=True), color=COLOURS[0], linewidth=0.6)
            axes.plot(*point, "o", color=COLOURS[0], markersize=4)
            write(axes, name, place, point, COLOURS[0])
    axes.margins(0.2, 0.14)
    name_panel(axes, f"{NARROW}: parts, lr 0.04, seed 1", "APGD")


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
    axes.margins(x=0.4, y=0.15)
    state = "published, and ours" if measured else "published"
    name_panel(axes, f"{title}: {state}", "AutoAttack")


def name_panel(axes: Axes, title: str, attack: str) -> None:
    """Title and axes of a panel."""
    axes.set_title(title, fontsize=10)
    axes.set(xlabel="clean accuracy (%)", ylabel=f"under {attack} (%)")


def write(axes: Axes, name: str, place: Place, point: Place, colour: str) -> None:
    """A name beside a point."""
    axes.annotate(name, point, place, textcoords="offset points", ha="center", fontsize=7.5, color=colour)


def point_of(rows: Sequence[Row], seed: int, attack: str) -> Place | None:
    """Per cent: clean, and under the attack; None where that is not measured of the seed."""
    row = next((row for row in rows if row.seed == seed), None)
    clean, robust = (row.share("clean"), row.share(attack)) if row else (None, None)
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
