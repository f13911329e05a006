"""Figures of a model card or an evaluation folder, as PNG files 1,050 pixels wide. No torch, no display, no pyplot.

`save_figure` writes what a `*_figure` draws: equal input gives equal bytes. Names are drawn as they
are, never as math, on one line, shortened where they would not fit. Colours are Okabe and Ito's, never alone.
"""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.style
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from matplotlib.textpath import text_to_path

from arrest_hub.results import wilson_interval

WIDTH, HEIGHT, DPI = 7.0, 4.2, 150
MOST_BARS = 25  # of up to so many classes each gets bars
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
BLUE, ORANGE, WRONG, DARK, GREY = COLOURS[0], COLOURS[4], "#B34700", "#222222", "#666666"
MARKERS, LINE_STYLES, HATCHES = ("o", "s", "^", "D", "v"), ("-", "--", "-.", ":"), ("", "///", "...", "xx")
Array = np.ndarray[Any, Any]
Curves = Mapping[str, Sequence["PlotPoint"]]
Counts = Sequence[tuple[int, int]]  # (correct, n) of each class
STYLE = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.grid": True,
    "axes.edgecolor": GREY, "grid.color": "#dddddd", "hatch.linewidth": 0.6, "text.parse_math": False,
}  # fmt: skip


class PlotPoint(NamedTuple):
    """How many of ``n`` images were classified correctly at radius ``eps``, on pixels in [0, 1]."""

    eps: float
    correct: int
    n: int


class GalleryRow(NamedTuple):
    """One image before and after the attack: two arrays [H, W, 3] in [0, 1]; confidences are probabilities."""

    clean: Array
    adversarial: Array
    label: str
    clean_prediction: str
    adversarial_prediction: str
    clean_confidence: float
    adversarial_confidence: float


@contextmanager
def _style() -> Iterator[None]:
    """The same style whatever the user's settings; a character that the font lacks becomes a box, silently."""
    with matplotlib.style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(Glyph|Matplotlib currently does not support)", category=UserWarning)
        yield


@_style()
def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, its folder made where it is not there, and return ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=DPI, metadata={"Software": None})
    return path


def _points(text: str, size: float = 10, weight: str = "normal") -> float:
    font = FontProperties(size=size, weight=weight)
    return float(text_to_path.get_text_width_height_descent(text, font, ismath=False)[0])


def _shorten(text: str, width: float, size: float = 10, weight: str = "normal") -> str:
    """``text`` on one line without control characters, ending in an ellipsis if wider than ``width`` points."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())[:200]
    if _points(text, size, weight) <= width:
        return text
    fitting = bisect_right(range(len(text)), width, key=lambda end: _points(text[:end] + "…", size, weight)) - 1
    return text[: max(fitting, 0)].rstrip() + "…"


def _percent(correct: int, n: int) -> tuple[float, float, float]:
    """Accuracy and its 95 % interval, in per cent. Raises ValueError where ``correct`` of ``n`` is no proportion."""
    low, high = wilson_interval(correct, n)
    value = 100 * correct / n
    return value, min(100 * low, value), max(100 * high, value)


def _head(figure: Figure, title: str, handles: Sequence[Artist], names: Sequence[str]) -> None:
    """Title and legend, above the axes, where they never cover data."""
    names = [_shorten(name, 420) for name in names]
    widths = [_points(name) + 50 for name in names]
    columns = len(names) if sum(widths) <= 490 else max(1, int(490 // max(widths)))
    # labels are set afterwards because a legend refuses those with a leading underscore
    legend = figure.legend(
        handles, ["."] * len(names), title=_shorten(title, 480, 12), title_fontsize=12,
        loc="outside upper left", alignment="left", ncols=columns, columnspacing=1.5, handlelength=2.6, frameon=False,
    )  # fmt: skip
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)


def _per_cent_axis(axes: Axes, which: str, label: str) -> None:
    axes.set(**{f"{which}lim": (0, 100), f"{which}label": label, f"{which}ticks": range(0, 101, 20)})
    axes.grid(visible=False, axis="x" if which == "y" else "y")


@_style()
def eps_curve_figure(curves: Curves, *, norm: str, eps: float | None, attack: str) -> Figure:
    """Draw accuracy against the attack's radius, a line a model, with 95 % intervals.

    ``curves``: points in any order, by the model's name. ``norm``: "linf" (radii are drawn in units of 1/255), "l2" or
    "l1". ``eps``: radius of the evaluation, on pixels in [0, 1], marked by a line; or None. ``attack``: as shown.
    Raises ValueError for no curve, one without points, or a point whose ``correct`` of ``n`` is no proportion.
    """
    if not curves or not all(curves.values()):
        raise ValueError("there is nothing to draw: each of one or more curves needs a point")
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.subplots()
    linf, unit = norm == "linf", 255 if norm == "linf" else 1
    handles: list[Artist] = []
    looks = zip(map(sorted, curves.values()), cycle(COLOURS), cycle(MARKERS), cycle(LINE_STYLES), strict=False)
    for points, colour, marker, style in looks:
        x = [unit * point.eps for point in points]
        y, low, high = zip(*(_percent(point.correct, point.n) for point in points), strict=True)
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        if len(points) == 1:  # an area without width would not show
            axes.vlines(x, low, high, color=colour, alpha=0.4, linewidth=6)
        handles += axes.plot(x, y, color=colour, marker=marker, ls=style, linewidth=1.8, clip_on=False, zorder=3)
    handles.append(Patch(color=GREY, alpha=0.25, linewidth=0))
    names = [*curves, "95 % interval"]
    if eps is not None:
        handles.append(axes.axvline(unit * eps, color=DARK, linestyle=(0, (1, 2)), linewidth=1))
        names.append(f"evaluated at {round(255 * eps, 2):g}/255" if linf else f"evaluated at {eps:g}")
    right = unit * max([point.eps for points in curves.values() for point in points] + [eps or 0.0]) or 1.0
    axes.set(xlim=(-0.02 * right, 1.02 * right), xlabel="eps (1/255), linf norm" if linf else f"eps, {norm} norm")
    axes.locator_params(axis="x", nbins=9, integer=linf and right > 2, steps=[1, 2, 4, 5, 10])
    _per_cent_axis(axes, "y", "accuracy (%)")
    _head(figure, f"Accuracy under {attack} by size of the perturbation", handles, names)
    return figure


@_style()
def per_class_figure(
    class_names: Sequence[str], clean: Counts, robust: Counts, *, attack: str, eps: str, norm: str
) -> Figure:
    """Draw each class's accuracy, clean and under attack.

    Up to 25 classes get bars with 95 % intervals; more are drawn in the order of their clean accuracy, with the five
    best and worst under attack in words. A class without images is marked, or with more than 25 classes left out.
    ``clean`` and ``robust``: K pairs (correct, n). ``attack``, ``eps``, ``norm``: such as "PGD-20", "8/255", "linf".
    Raises ValueError for no class, lengths that differ, or a pair with images that is no proportion.
    """
    k = len(class_names)
    if not k == len(clean) == len(robust) > 0:
        raise ValueError(f"{k} class names, {len(clean)} clean and {len(robust)} robust pairs")
    few = k <= MOST_BARS
    figure = Figure(figsize=(WIDTH, max(HEIGHT, 1.3 + 0.33 * k) if few else HEIGHT), layout="constrained")
    handles = (_class_bars if few else _class_curves)(figure, class_names, clean, robust)
    _head(figure, "Accuracy of each class, clean and under attack", handles, ["clean", f"{attack} ({norm} {eps})"])
    return figure


def _class_bars(figure: Figure, names: Sequence[str], clean: Counts, robust: Counts) -> list[Artist]:
    axes = figure.subplots()
    handles: list[Artist] = []
    for pairs, offset, colour, hatch in ((clean, -0.2, BLUE, ""), (robust, 0.2, ORANGE, "///")):
        rows = [(i + offset, *_percent(*pair)) for i, pair in enumerate(pairs) if pair[1] != 0]
        y, value, low, high = (np.array([row[j] for row in rows]) for j in range(4))
        look: dict[str, Any] = {"facecolor": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0}
        axes.barh(y, value, 0.38, **look)
        margins = np.stack([value - low, high - value])
        axes.errorbar(value, y, xerr=margins, fmt="none", ecolor=DARK, elinewidth=1, capsize=2)
        handles.append(Patch(**look))
        for i in [i for i, pair in enumerate(pairs) if pair[1] == 0]:
            axes.text(1, i + offset, "no images", va="center", color=GREY, style="italic")
    labels = [_shorten(name, 150) for name in names]
    axes.set(yticks=range(len(names)), yticklabels=labels, ylim=(len(names) - 0.45, -0.55))
    _per_cent_axis(axes, "x", "accuracy (%), with its 95 % interval")
    return handles


def _class_curves(figure: Figure, names: Sequence[str], clean: Counts, robust: Counts) -> list[Artist]:
    axes, side = figure.subplots(1, 2, width_ratios=(1.7, 1))
    shown = [i for i in range(len(names)) if clean[i][1] != 0 and robust[i][1] != 0]
    value = {i: (_percent(*robust[i])[0], _percent(*clean[i])[0]) for i in shown}
    by_clean = sorted(shown, key=lambda i: -value[i][1])
    rank = range(1, len(shown) + 1)
    lines = axes.plot(rank, [value[i][1] for i in by_clean], color=BLUE, linewidth=2.2, clip_on=False, zorder=3)
    lines += axes.plot(rank, [value[i][0] for i in by_clean], "^", color=ORANGE, ms=4, mew=0, clip_on=False)
    left_out = f"\nleft out for want of images: {len(names) - len(shown)}" if len(shown) < len(names) else ""
    axes.set_xlabel(f"rank of the class by clean accuracy{left_out}")
    _per_cent_axis(axes, "y", "accuracy (%)")
    side.set_axis_off()
    by_robust = sorted(shown, key=value.__getitem__)
    for top, heading, chosen in ((1.0, "highest", by_robust[5:][-5:][::-1]), (0.46, "lowest", by_robust[:5])):
        side.text(0, top, f"{heading} under attack", va="top", weight="bold")
        for line, i in enumerate(chosen, start=1):
            side.text(0.19, top - 0.075 * line, f"{value[i][0]:.0f} %", va="top", ha="right")
            side.text(0.23, top - 0.075 * line, _shorten(names[i], 125), va="top")
    return list(lines)


@_style()
def gallery_figure(rows: Sequence[GalleryRow], *, eps: str, norm: str) -> Figure:
    """Draw images before and after the attack, their amplified difference and the predictions.

    The difference is drawn as 0.5 + k (adversarial - clean), where k lets the largest difference of all reach 0 or 1;
    k is written beside it. Three to six images stand side by side, otherwise each has a row.
    Raises ValueError for no rows, or arrays that are not two of the same shape [H, W, 3].
    """
    if not rows or any(row.clean.shape != row.adversarial.shape or row.clean.shape[2:] != (3,) for row in rows):
        raise ValueError("a gallery needs one or more pairs of images, each pair of one shape [H, W, 3]")
    differences = [row.adversarial.astype(np.float64) - row.clean for row in rows]
    largest = max(float(np.abs(difference).max()) for difference in differences)
    k = 0.5 / largest if largest > 1e-6 else 1.0
    kinds = ["clean", f"difference ×{round(k, 1 if k < 10 else 0):g}", "adversarial"]
    across = 3 <= len(rows) <= 6
    lines, columns = (3, len(rows)) if across else (len(rows), 3)
    width = min(2.1, 6.45 / columns)  # of an image, in inches
    tallest = width * min(1.5, max(row.clean.shape[0] / row.clean.shape[1] for row in rows))
    height = (1.7 if across else 0.6 + 0.46 * lines) + lines * (tallest + 0.03)
    figure = Figure(figsize=(WIDTH, height), layout=ConstrainedLayoutEngine(compress=True, h_pad=0.035, hspace=0))
    grid = figure.subplots(lines, columns, squeeze=False)
    labels = [f"true label:\n{_shorten(row.label, 72 * width)}" for row in rows]
    for i, title in enumerate(labels if across else kinds):
        grid[0, i].set_title(title, fontsize=10)
    for i, title in enumerate(kinds if across else labels):
        grid[i, 0].set_ylabel(title)
    for row, difference, line in zip(rows, differences, grid.T if across else grid, strict=True):
        for axes, picture in zip(line, (row.clean, 0.5 + k * difference, row.adversarial), strict=True):
            # None is matplotlib's own choice, called "antialiased" until 3.9 and "auto" from 3.10
            axes.imshow(picture.clip(0.0, 1.0), interpolation="nearest" if max(picture.shape) <= 64 else None)
            axes.set(xticks=[], yticks=[], frame_on=False)
        # each field after the label comes twice: of the clean image, then of the adversarial one
        for axes, prediction, confidence in zip(line[::2], row[3:5], row[5:7], strict=True):
            mark, colour, weight = ("✓", DARK, "normal") if prediction == row.label else ("✗", WRONG, "bold")
            name = _shorten(f"{mark} {prediction}", 72 * width, weight=weight)
            axes.set_xlabel(f"{name}\n{100 * confidence:.0f} %", color=colour, weight=weight)
    title = f"Images before and after the attack ({norm} {eps}); ✗ marks a wrong prediction"
    figure.suptitle(_shorten(title, 490, 12), fontsize=12, x=0.01, ha="left")
    return figure


@_style()
def drift_figure(drifts: Mapping[str, Array], *, threshold: float | None) -> Figure:
    """Draw histograms of representation drift, in per cent of a series' images a bin.

    ``drifts``: by the series' name, [N] angular distances to the teacher's representation divided by pi, in [0, 1].
    ``threshold``: replay threshold tau, marked by a dashed line; or None.
    Raises ValueError for no series, one without values, or a value that is not in [0, 1], but for a rounding error.
    """
    series = [np.asarray(values, dtype=np.float64).ravel() for values in drifts.values()]
    if not series or not all(len(values) and np.all(np.abs(values - 0.5) <= 0.5 + 1e-6) for values in series):
        raise ValueError("drift needs one or more series of values in [0, 1]")
    top = max([threshold or 0.0, *(float(values.max()) for values in series)])
    edges = np.linspace(0.0, top if top > 1e-6 else 0.01, 41)
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.subplots()
    handles: list[Artist] = []
    for values, colour, hatch in zip(series, cycle(COLOURS), cycle(HATCHES), strict=False):
        share = 100 * np.histogram(values.clip(min=0.0), edges)[0] / len(values)
        look: dict[str, Any] = {"facecolor": (colour, 0.3), "edgecolor": colour, "hatch": hatch, "linewidth": 1.6}
        handles.append(axes.stairs(share, edges, fill=True, **look))
    names = [f"{name} (n = {len(values)})" for name, values in zip(drifts, series, strict=True)]
    if threshold is not None:
        handles.append(axes.axvline(threshold, color=DARK, linestyle="--", linewidth=1.4))
        names.append(f"replay threshold tau = {threshold:g}")
    axes.set(xlim=(0, 1.03 * edges[-1]), xlabel="angular distance to the teacher's representation (share of pi)")
    axes.set(ylim=(0, None), ylabel="share of images (% per bin)")
    axes.grid(visible=False, axis="x")
    _head(figure, "How far representations are from the teacher's", handles, names)
    return figure
