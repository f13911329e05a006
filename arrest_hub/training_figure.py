"""The training curves of a model card, drawn from a run's log.jsonl as `figures` draws the rest. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter

from arrest_hub.figures import (
    BLUE,
    COLOURS,
    DARK,
    GREY,
    HEIGHT,
    LINE_STYLES,
    MARKERS,
    WIDTH,
    Array,
    _head,
    _per_cent_axis,
    _style,
)

MOST_POINTS, MOST_MARKERS = 200, 25  # of a curve
REPLAY_RATE = "replay_rate"
CURVES = {  # by the name in log.jsonl: the name shown, the colour, which marker and line style
    "clean_accuracy": ("clean, training batches", BLUE, 2, 0),
    "adversarial_accuracy": ("adversarial, training batches", COLOURS[1], 4, 1),
    "validation_clean_accuracy": ("clean, validation images", BLUE, 0, 0),
    "validation_robust_accuracy": ("adversarial, validation images", COLOURS[1], 1, 1),
    "loss": ("loss", DARK, 0, 0),
    "cross_entropy": ("cross-entropy", COLOURS[2], 1, 1),
    "distance": ("distance", COLOURS[3], 2, 2),
    "drift_p50": ("median", BLUE, 0, 0),
    "drift_p90": ("90th percentile", COLOURS[1], 1, 1),
}


@_style()
def training_figure(
    entries: Sequence[Mapping[str, Any]], *, rgkd_weight: float | None = None, replay_threshold: float | None
) -> Figure:
    """Draw the robust phase of a run by optimizer step. A standard phase is left out.

    Above: accuracy on training batches (pale lines) and on validation images (with markers). Below: the loss and its
    parts and, of a run that logs it, how far clean images have drifted and how many were replayed. A curve of
    more than 200 values is thinned to at most as many points, each the average of equally many consecutive values.
    ``entries``: the lines of log.jsonl in order; what is missing, None or not finite is passed over. ``rgkd_weight``:
    the weight of "distance" in the loss (of TRADES: beta), which it is drawn times; None: drawn as logged.
    ``replay_threshold``: tau, marked by a dotted line where drift is drawn; or None.
    Raises ValueError if no entry of the robust phase has a number to draw.
    """
    robust = [entry for entry in entries if entry.get("phase") == "robust"]
    curves = {name: points for name in [*CURVES, REPLAY_RATE] if len(points := _logged(robust, name))}
    if not curves:
        raise ValueError("there is nothing to draw: no entry of the robust phase has a number")
    right = max(float(points[-1, 0]) for points in curves.values()) or 1.0
    drifts = any(name in curves for name in ("drift_p50", "drift_p90", REPLAY_RATE))
    figure = Figure(figsize=(WIDTH, 1.45 * HEIGHT), layout=ConstrainedLayoutEngine(wspace=0.05, hspace=0.05))
    panels = figure.subplot_mosaic([["accuracy", "accuracy"], ["loss", "drift" if drifts else "loss"]])
    for panel, axes in panels.items():
        axes.set(xlim=(-0.02 * right, 1.02 * right), xlabel="optimizer step")
        axes.locator_params(axis="x", nbins=5 if drifts and panel != "accuracy" else 9, integer=True)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(visible=False, axis="x")

    accuracies = _draw(panels["accuracy"], curves, [name for name in CURVES if name.endswith("accuracy")], 100.0)
    _per_cent_axis(panels["accuracy"], "y", "accuracy (%)")
    _head(figure, "Training curves of the robust phase", list(accuracies.values()), list(accuracies))

    losses = _draw(panels["loss"], curves, ["loss"])
    if "distance" in curves:  # otherwise the loss is the cross-entropy
        weight, name = (1.0, "distance") if rgkd_weight is None else (rgkd_weight, f"{rgkd_weight:.3g} × distance")
        losses |= _draw(panels["loss"], curves, ["cross_entropy"])
        losses[name] = _draw(panels["loss"], curves, ["distance"], weight)["distance"]
    panels["loss"].set(ylim=(0, None), ylabel="loss")
    _legend(panels["loss"], losses)
    if drifts:
        _draw_drift(panels["drift"], curves, replay_threshold)
    return figure


def _logged(entries: Sequence[Mapping[str, Any]], name: str) -> Array:
    """[n, 2]: the steps, and what was logged under ``name``, thinned."""
    pairs = [(entry.get("step"), entry.get(name)) for entry in entries]
    points = np.array([pair for pair in pairs if None not in pair], dtype=np.float64).reshape(-1, 2)
    points = points[np.isfinite(points).all(axis=1)]
    size = -(-len(points) // MOST_POINTS) or 1  # the same for all, lest a part of the curve look smoother
    means = [points[start : start + size].mean(axis=0) for start in range(0, len(points), size)]
    return np.array(means).reshape(-1, 2)


def _draw(axes: Axes, curves: Mapping[str, Array], names: Sequence[str], factor: float = 1.0) -> dict[str, Artist]:
    """Draw those of ``names`` that were logged, times ``factor``. Returns the lines by the names to show."""
    lines: dict[str, Artist] = {}
    for name in [name for name in names if name in curves]:
        shown, colour, marker, line_style = CURVES[name]
        steps, values = curves[name].T
        marked = name.startswith("validation") or len(steps) == 1  # a line through one point would not show
        pale = shown.endswith("batches")  # and larger, as validation's marker may lie on it
        (lines[shown],) = axes.plot(
            steps, factor * values, color=colour, alpha=0.5 if pale else 1.0, linestyle=LINE_STYLES[line_style],
            linewidth=1.5, marker=MARKERS[marker] if marked else "", markersize=9 if pale else 5,
            markevery=-(-len(steps) // MOST_MARKERS), clip_on=False, zorder=3,
        )  # fmt: skip
    return lines


def _draw_drift(axes: Axes, curves: Mapping[str, Array], threshold: float | None) -> None:
    handles = _draw(axes, curves, ["drift_p50", "drift_p90"])
    if threshold is not None:
        handles[f"tau = {threshold:g}"] = axes.axhline(threshold, color=DARK, linestyle=(0, (1, 2)), linewidth=1.4)
    axes.set(ylim=(0, None), ylabel="drift (share of pi)")
    if REPLAY_RATE in curves:
        steps, rates = curves[REPLAY_RATE].T
        right = axes.twinx()
        right.fill_between(steps, 100 * rates, color=GREY, alpha=0.3, linewidth=0)
        if len(steps) == 1:  # an area without width would not show
            right.vlines(steps, 0, 100 * rates, color=GREY, alpha=0.3, linewidth=6)
        handles["replayed"] = Patch(color=GREY, alpha=0.3, linewidth=0)
        right.set(ylim=(0, max(1.0, 105 * rates.max())), ylabel="images replayed (%)")
        right.spines.right.set_visible(True)
        right.grid(visible=False)
        axes.set(zorder=right.get_zorder() + 1, frame_on=False)  # the lines above the area
    _legend(axes, handles)


def _legend(axes: Axes, handles: Mapping[str, Artist]) -> None:
    """A small legend above the axes, where it never covers data."""
    axes.legend(
        list(handles.values()), list(handles), loc="lower left", bbox_to_anchor=(0, 1.02), ncols=2, fontsize=9,
        borderaxespad=0, borderpad=0, columnspacing=1, handlelength=2, handletextpad=0.5, frameon=False,
    )  # fmt: skip
