import struct
import subprocess
import sys
import warnings

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread

from arrest_hub.figures import (
    GalleryRow,
    PlotPoint,
    drift_figure,
    eps_curve_figure,
    gallery_figure,
    per_class_figure,
    save_figure,
)
from arrest_hub.results import wilson_interval
from arrest_hub.training_figure import training_figure

ODD = ["$x$", "a_b^c", "猫 🐱", "line\nbreak\t\udc80", "W" * 500, "", "_hidden", "\\frac{1}", "$"]
SHOWN = {"attack": "PGD-20", "eps": "8/255", "norm": "linf"}
CURVE = [PlotPoint(i / 255, 180 - 10 * i, 200) for i in range(0, 17, 2)]


def row(size=8, label="cat", adversarial_prediction="dog", shift=8 / 255, **changes):
    clean = np.linspace(0.2, 0.8, size * size * 3, dtype=np.float32).reshape(size, size, 3)
    adversarial = clean.copy()
    adversarial[0, 0] += shift
    values = {"clean_confidence": 0.934, "adversarial_confidence": 0.7, "clean_prediction": label}
    return GalleryRow(clean, adversarial, label, adversarial_prediction=adversarial_prediction, **(values | changes))


def drawn(draw, tmp_path, *args, **options):
    """Draws twice, without a warning; checks kind, width and equal bytes; returns the height in pixels."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = [save_figure(draw(*args, **options), tmp_path / folder / "figure.png") for folder in ("a/b", "c")]
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == ["a/b/figure.png", "c/figure.png"]
    first, second = (path.read_bytes() for path in paths)
    assert first[:8] == b"\x89PNG\r\n\x1a\n"
    assert first == second
    assert b"Software" not in first
    width, height = struct.unpack(">II", first[16:24])
    assert width == 1050
    # a text that is cut off would leave ink on the last columns
    assert imread(paths[0])[:, [0, -1], :3].min() == 1.0
    return height


def legend_texts(figure):
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def test_eps_curve_draws_the_percentages_and_their_intervals():
    shuffled = [CURVE[i] for i in (3, 0, 8, 1, 2, 7, 4, 6, 5)]
    curves = {"student": shuffled, "teacher": [PlotPoint(0.0, 190, 200), PlotPoint(16 / 255, 0, 200)]}
    figure = eps_curve_figure(curves, norm="linf", eps=8 / 255, attack="PGD-20")
    (axes,) = figure.axes
    student, teacher, marked = axes.lines
    assert list(student.get_xdata()) == pytest.approx(list(range(0, 17, 2)))
    assert list(student.get_ydata()) == pytest.approx([90 - 5 * i for i in range(0, 17, 2)])
    assert list(teacher.get_ydata()) == pytest.approx([95, 0])
    assert list(marked.get_xdata()) == pytest.approx([8, 8])
    assert (student.get_marker(), student.get_linestyle()) != (teacher.get_marker(), teacher.get_linestyle())
    band = axes.collections[0].get_paths()[0].vertices
    at_zero = band[np.isclose(band[:, 0], 0.0), 1]
    assert (at_zero.min(), at_zero.max()) == pytest.approx([100 * bound for bound in wilson_interval(180, 200)])
    assert axes.get_ylim() == (0, 100)
    assert axes.get_xlabel() == "eps (1/255), linf norm"
    assert legend_texts(figure) == ["student", "teacher", "95 % interval", "evaluated at 8/255"]
    assert figure.legends[0].get_title().get_text() == "Accuracy under PGD-20 by size of the perturbation"


def test_eps_curve_of_another_norm_is_in_plain_numbers():
    figure = eps_curve_figure({"a": [PlotPoint(0.5, 3, 4)]}, norm="l2", eps=0.25, attack="PGD-20")
    (axes,) = figure.axes
    assert axes.get_xlabel() == "eps, l2 norm"
    assert list(axes.lines[0].get_xdata()) == [0.5]
    assert legend_texts(figure)[-1] == "evaluated at 0.25"
    without = eps_curve_figure({"a": [PlotPoint(0.5, 3, 4)]}, norm="l2", eps=None, attack="PGD-20")
    assert len(without.axes[0].lines) == 1


@pytest.mark.parametrize(
    ("curves", "norm", "eps"),
    [
        ({"student": CURVE, "teacher": CURVE[:3]}, "linf", 8 / 255),
        ({"only": [PlotPoint(0.0, 0, 1)]}, "l1", None),
        (dict.fromkeys(ODD, CURVE), "linf", 0.5 / 255),
    ],
)
def test_eps_curve_file(tmp_path, curves, norm, eps):
    assert drawn(eps_curve_figure, tmp_path, curves, norm=norm, eps=eps, attack="PGD-20") == 630


def test_eps_curve_refuses_what_cannot_be_drawn():
    for curves in ({}, {"a": []}, {"a": [PlotPoint(0.0, 0, 0)]}, {"a": [PlotPoint(0.0, 3, 2)]}):
        with pytest.raises(ValueError, match=r"nothing to draw|no proportion"):
            eps_curve_figure(curves, norm="linf", eps=None, attack="PGD-20")


def test_bars_are_as_wide_as_the_accuracies():
    figure = per_class_figure(["a", "b", "c"], [(9, 10), (0, 10), (0, 0)], [(5, 10), (0, 0), (0, 0)], **SHOWN)
    (axes,) = figure.axes
    clean, robust = (container for container in axes.containers if len(container) and hasattr(container, "patches"))
    assert [bar.get_width() for bar in clean] == pytest.approx([90, 0])
    assert [bar.get_width() for bar in robust] == pytest.approx([50])
    assert robust[0].get_hatch() != clean[0].get_hatch()
    whiskers = axes.collections[0].get_segments()[0]
    assert list(whiskers[:, 0]) == pytest.approx([100 * bound for bound in wilson_interval(9, 10)])
    assert [text.get_text() for text in axes.texts] == ["no images"] * 3
    assert [round(text.get_position()[1], 1) for text in axes.texts] == [1.8, 1.2, 2.2]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]
    assert axes.yaxis_inverted()  # the first class on top
    assert legend_texts(figure) == ["clean", "PGD-20 (linf 8/255)"]


def test_many_classes_are_ranked():
    n = 1000
    clean = [((7 * i) % n, n) for i in range(n)]  # 7 and n are coprime: every accuracy once
    robust = [(correct // 2, n) for correct, _ in clean]
    by_clean = {correct: f"class {i}" for i, (correct, _) in enumerate(clean)}
    clean[3] = (0, 0)
    figure = per_class_figure([f"class {i}" for i in range(n)], clean, robust, **SHOWN)
    axes, side = figure.axes
    assert list(axes.lines[0].get_xdata()) == list(range(1, n))
    assert list(axes.lines[0].get_ydata()) == [v / 10 for v in range(n - 1, -1, -1) if v != 21]
    assert list(axes.lines[1].get_ydata()) == pytest.approx([v // 2 / 10 for v in range(n - 1, -1, -1) if v != 21])
    assert "left out for want of images: 1" in axes.get_xlabel()
    texts = [text.get_text() for text in side.texts]
    assert len(texts) == 22
    assert texts[2::2][:5] == [by_clean[v] for v in (999, 998, 997, 996, 995)]
    assert texts[13::2] == [by_clean[v] for v in (0, 1, 2, 3, 4)]
    assert texts[1] == "50 %"
    assert texts[12] == "0 %"


@pytest.mark.parametrize(
    ("names", "height"), [(["one"], 630), (["one", "two"], 630), (ODD, 640), (list("abcdefghijklmnopqrstuvwxy"), 1432)]
)
def test_per_class_file_with_few_classes(tmp_path, names, height):
    counts = [(i % 3, 3) for i in range(len(names))]
    counts[-1] = (0, 0)
    assert drawn(per_class_figure, tmp_path, names, counts, counts, **SHOWN) == pytest.approx(height, abs=2)


@pytest.mark.parametrize("n", [0, 50])
def test_per_class_file_with_many_classes(tmp_path, n):
    names = (ODD * 112)[:1000]
    assert drawn(per_class_figure, tmp_path, names, [(n, n)] * 1000, [(n // 2, n)] * 1000, **SHOWN) == 630


def test_per_class_refuses_what_cannot_be_drawn():
    for names, clean, robust in ([], [], []), (["a"], [(1, 1)], []), (["a"], [(2, 1)], [(0, 1)]):
        with pytest.raises(ValueError, match=r"class names|no proportion"):
            per_class_figure(names, clean, robust, **SHOWN)
    with pytest.raises(ValueError, match="no proportion"):
        per_class_figure(["a"] * 30, [(2, 1)] * 30, [(0, 1)] * 30, **SHOWN)


def test_gallery_amplifies_the_largest_difference():
    rows = [row(), row(shift=-4 / 255), row(size=224)]
    figure = gallery_figure(rows, eps="8/255", norm="linf")
    grid = np.array(figure.axes).reshape(3, 3)  # a column an image
    assert [axes.get_ylabel() for axes in grid[:, 0]] == ["clean", "difference ×16", "adversarial"]
    images = [[axes.images[0] for axes in line] for line in grid]
    np.testing.assert_array_equal(images[0][0].get_array(), rows[0].clean)
    np.testing.assert_array_equal(images[2][1].get_array(), rows[1].adversarial)
    np.testing.assert_allclose(images[1][0].get_array()[0, 0], 1.0, atol=1e-5)
    np.testing.assert_allclose(images[1][1].get_array()[0, 0], 0.25, atol=1e-5)
    np.testing.assert_array_equal(images[1][0].get_array()[1:], 0.5)
    default = matplotlib.rcParamsDefault["image.interpolation"]
    assert [image.get_interpolation() for image in images[0]] == ["nearest", "nearest", default]


def test_gallery_marks_wrong_predictions():
    figure = gallery_figure([row(), row(adversarial_prediction="cat", label="cat")], eps="8/255", norm="linf")
    grid = np.array(figure.axes).reshape(2, 3)  # a row an image
    assert [axes.get_title() for axes in grid[0]] == ["clean", "difference ×16", "adversarial"]
    assert grid[0, 0].get_ylabel() == "true label:\ncat"
    assert grid[0, 0].get_xlabel() == "✓ cat\n93 %"
    assert grid[0, 1].get_xlabel() == ""
    assert grid[0, 2].get_xlabel() == "✗ dog\n70 %"
    assert grid[1, 2].get_xlabel() == "✓ cat\n70 %"
    assert grid[0, 2].xaxis.label.get_color() != grid[1, 2].xaxis.label.get_color()


@pytest.mark.parametrize(
    ("shift", "shown"), [(0.0, "×1"), (0.25, "×2"), (0.2, "×2.5"), (0.5 / 9.97, "×10"), (0.5 / 1234, "×1234")]
)
def test_gallery_writes_the_amplification(shift, shown):
    figure = gallery_figure([row(shift=shift)], eps="8/255", norm="linf")
    assert figure.axes[1].get_title() == f"difference {shown}"
    assert figure.axes[1].images[0].get_array()[0, 0, 0] == pytest.approx(1.0 if shift else 0.5, abs=1e-3)


@pytest.mark.parametrize("rows", [[row(shift=0.0)], [row(32, name, name * 2) for name in ODD[:6]], [row()] * 7])
def test_gallery_file(tmp_path, rows):
    assert drawn(gallery_figure, tmp_path, rows, eps="8/255", norm="linf") > 400


@pytest.mark.parametrize("count", [1, 3, 6, 8])
def test_no_text_of_a_gallery_covers_another(count):
    figure = gallery_figure([row(32, "American Staffordshire terrier")] * count, eps="8/255", norm="linf")
    figure.draw_without_rendering()
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    boxes.append(figure.get_suptitle() and figure._suptitle.get_window_extent())
    assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.padded(-1).overlaps(b.padded(-1))]


def test_gallery_refuses_what_cannot_be_drawn():
    good = row()
    for rows in (
        [],
        [good._replace(clean=good.clean[1:])],
        [good._replace(clean=good.clean[0], adversarial=good[0][0])],
    ):
        with pytest.raises(ValueError, match="gallery"):
            gallery_figure(rows, eps="8/255", norm="linf")


def test_drift_is_in_shares_of_the_images():
    drifts = {"clean images": np.array([0.0, 0.01, 0.01, 0.2]), "adversarial images": np.linspace(0, 0.4, 1000)}
    figure = drift_figure(drifts, threshold=0.1)
    (axes,) = figure.axes
    steps = [patch.get_data() for patch in axes.patches]
    assert len(steps) == 2
    assert axes.patches[0].get_hatch() != axes.patches[1].get_hatch()
    for values, edges, _ in steps:
        assert values.sum() == pytest.approx(100)
        assert (edges[0], edges[-1]) == pytest.approx((0, 0.4))
    assert list(steps[0].values[:3]) == pytest.approx([25, 50, 0])
    assert axes.lines[0].get_xdata()[0] == 0.1
    assert axes.lines[0].get_linestyle() == "--"
    low, high = axes.get_xlim()
    assert low == 0
    assert 0.4 < high < 0.45
    names = ["clean images (n = 4)", "adversarial images (n = 1000)", "replay threshold tau = 0.1"]
    assert legend_texts(figure) == names


@pytest.mark.parametrize(
    ("drifts", "threshold"),
    [
        ({"clean images": np.zeros(50)}, None),
        ({"clean images": np.zeros(50), "adversarial images": np.ones(3, dtype=np.float32)}, 0.3),
        ({name: np.full(2, 1e-9) for name in ODD}, 0.0),
        ({"clean images": np.array([-1e-7, 1 + 1e-7])}, None),
    ],
)
def test_drift_file(tmp_path, drifts, threshold):
    assert drawn(drift_figure, tmp_path, drifts, threshold=threshold) == 630
    for patch in drift_figure(drifts, threshold=threshold).axes[0].patches:
        assert patch.get_data().values.sum() == pytest.approx(100)


def test_drift_refuses_what_is_no_drift():
    for drifts in ({}, {"a": np.array([])}, {"a": np.array([np.nan])}, {"a": np.array([1.1])}, {"a": np.array([-0.1])}):
        with pytest.raises(ValueError, match="drift"):
            drift_figure(drifts, threshold=None)


def arrest_log(lines, every=10):
    """What ARREST logs: a standard phase, then ``lines`` lines of the robust one, with validation every third."""
    log = [{"phase": "standard", "step": 10, "epoch": 0, "loss": 9.0, "clean_accuracy": 0.01, "lr": 0.1}]
    log.append({"phase": "standard", "step": 10, "epoch": 1, "validation_clean_accuracy": 0.02, "n": 50})
    for i in range(1, lines + 1):
        step = {"phase": "robust", "step": every * i, "epoch": i // 3}
        values = {"adversarial_accuracy": 0.5 * i / lines, "clean_accuracy": 0.9, "cross_entropy": 2 / i}
        values |= {"distance": 0.1, "drift_p50": 0.2 / i, "drift_p90": 0.3 / i, "drift_max": 0.9, "drift": 0.8}
        values |= {"loss": 2 / i + 1, "replay_rate": 0.25 / i, "zero_gradient_share": 0.0, "lr": 0.1, "grad_norm": None}
        log.append(step | values)
        if i % 3 == 0:
            values = {"validation_clean_accuracy": 0.8, "n": 50, "validation_robust_accuracy": 0.4 * i / lines}
            log.append(step | values | {"validation_harmonic_mean": 0.7})
    return log


def baseline_log(lines):
    """Adversarial training logs neither a clean accuracy nor a distance, and the loss is the cross-entropy."""
    kept = ("phase", "step", "adversarial_accuracy", "cross_entropy", "validation_clean_accuracy")
    log = [{name: value for name, value in entry.items() if name in kept} for entry in arrest_log(lines)]
    return [entry | ({"loss": entry["cross_entropy"]} if "cross_entropy" in entry else {}) for entry in log]


def axes_legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_training_draws_what_the_robust_phase_logged():
    figure = training_figure(arrest_log(6), rgkd_weight=10.0, replay_threshold=0.2)
    accuracy, loss, drift, replay = figure.axes
    clean, adversarial, validation_clean, validation_robust = accuracy.lines
    steps = [10, 20, 30, 40, 50, 60]
    for line in (clean, adversarial, *loss.lines, *drift.lines[:2]):
        assert list(line.get_xdata()) == steps
        assert line.get_marker() in ("", "None")
    assert list(clean.get_ydata()) == pytest.approx([90] * 6)
    assert list(adversarial.get_ydata()) == pytest.approx([50 * i / 6 for i in range(1, 7)])
    for line, values in ((validation_clean, [80, 80]), (validation_robust, [20, 40])):
        assert list(line.get_xdata()) == [30, 60]
        assert list(line.get_ydata()) == pytest.approx(values)
    assert validation_clean.get_marker() != validation_robust.get_marker()
    assert clean.get_linestyle() != adversarial.get_linestyle()
    total, cross_entropy, distance = (np.array(line.get_ydata()) for line in loss.lines)
    np.testing.assert_allclose(cross_entropy, [2 / i for i in range(1, 7)])
    np.testing.assert_allclose(distance, 1.0)
    np.testing.assert_allclose(cross_entropy + distance, total)
    assert len({line.get_linestyle() for line in loss.lines}) == 3
    median, high, threshold = drift.lines
    assert list(median.get_ydata()) == pytest.approx([0.2 / i for i in range(1, 7)])
    assert list(high.get_ydata()) == pytest.approx([0.3 / i for i in range(1, 7)])
    assert list(threshold.get_ydata()) == [0.2, 0.2]
    area = replay.collections[0].get_paths()[0].vertices
    for i, step in enumerate(steps, start=1):
        assert area[np.isclose(area[:, 0], step), 1].max() == pytest.approx(25 / i)
    assert accuracy.get_ylim() == (0, 100)
    assert [axes.get_xlabel() for axes in (accuracy, loss, drift)] == ["optimizer step"] * 3
    kinds = ["training batches", "validation images"]
    assert legend_texts(figure) == [f"{name}, {kind}" for kind in kinds for name in ("clean", "adversarial")]
    assert axes_legend(loss) == ["loss", "cross-entropy", "10 × distance"]
    assert axes_legend(drift) == ["median", "90th percentile", "tau = 0.2", "replayed"]


def test_training_without_drift_gives_the_loss_the_whole_width():
    figure = training_figure(baseline_log(6), replay_threshold=0.2)
    accuracy, loss = figure.axes
    figure.draw_without_rendering()
    assert loss.get_position().width == pytest.approx(accuracy.get_position().width)
    (line,) = loss.lines
    assert list(line.get_ydata()) == pytest.approx([2 / i for i in range(1, 7)])
    assert len(accuracy.lines) == 2
    assert legend_texts(figure) == ["adversarial, training batches", "clean, validation images"]
    assert axes_legend(loss) == ["loss"]


def test_training_draws_the_distance_as_logged_where_no_weight_is_given():
    figure = training_figure(arrest_log(4), replay_threshold=None)
    _, loss, drift, _ = figure.axes
    assert list(loss.lines[2].get_ydata()) == pytest.approx([0.1] * 4)
    assert axes_legend(loss)[2] == "distance"
    assert axes_legend(drift) == ["median", "90th percentile", "replayed"]


def test_a_long_training_is_averaged():
    figure = training_figure(arrest_log(999), rgkd_weight=10.0, replay_threshold=0.2)
    adversarial, validation = figure.axes[0].lines[1], figure.axes[0].lines[3]
    means = [np.arange(start, min(start + 5, 1000)).mean() for start in range(1, 1000, 5)]  # 199 of five, one of four
    np.testing.assert_allclose(adversarial.get_xdata(), [10 * mean for mean in means])
    np.testing.assert_allclose(adversarial.get_ydata(), [50 * mean / 999 for mean in means])
    assert len(validation.get_xdata()) == 167  # of 333
    assert len(validation.get_xdata()) / validation.get_markevery() <= 25
    assert figure.axes[0].get_xlim()[1] > 9950
    exact = training_figure(arrest_log(200), rgkd_weight=10.0, replay_threshold=0.2)
    assert list(exact.axes[0].lines[1].get_xdata()) == list(range(10, 2001, 10))


def test_training_passes_over_missing_values():
    log = arrest_log(5)
    log[3] |= {"loss": None, "drift_p90": None, "clean_accuracy": float("nan")}
    del log[2]["adversarial_accuracy"], log[2]["loss"]
    log.append({"phase": "robust", "loss": 5.0})
    accuracy, loss, drift, _ = training_figure(log, replay_threshold=0.2).axes
    assert list(accuracy.lines[0].get_xdata()) == [10, 30, 40, 50]
    assert list(accuracy.lines[1].get_xdata()) == [20, 30, 40, 50]
    assert list(loss.lines[0].get_xdata()) == [30, 40, 50]
    assert list(drift.lines[0].get_xdata()) == [10, 20, 30, 40, 50]
    assert list(drift.lines[1].get_xdata()) == [10, 30, 40, 50]


def test_a_training_of_one_line_shows():
    accuracy, loss, drift, replay = training_figure(arrest_log(1), replay_threshold=0.2).axes
    lines = [*accuracy.lines, *loss.lines, *drift.lines[:2]]
    assert len(lines) == 7
    assert not {line.get_marker() for line in lines} & {"", "None"}
    assert accuracy.lines[0].get_marker() != accuracy.lines[1].get_marker()
    assert replay.collections[1].get_segments()[0][:, 1].max() == pytest.approx(25)


@pytest.mark.parametrize(
    ("log", "weight", "threshold"),
    [
        (arrest_log(1), 10.0, 0.25),
        (arrest_log(2), None, None),
        (arrest_log(3), 0.123456, 0.123456),
        (arrest_log(20_000), 1e5, 1.0),
        (arrest_log(50, every=100_000), 10.0, 0.0),
        (baseline_log(2), None, 0.25),
        (baseline_log(20_000), None, None),
        ([{"phase": "robust", "step": 1, "loss": 0.5}], None, None),
        ([{"phase": "robust", "step": 1, "replay_rate": 0.0}], None, None),
        ([{"phase": "robust", "step": 0, "validation_clean_accuracy": 1.0, "n": 3}], None, 0.25),
    ],
)
def test_training_file(tmp_path, log, weight, threshold):
    assert drawn(training_figure, tmp_path, log, rgkd_weight=weight, replay_threshold=threshold) == 913


@pytest.mark.parametrize("weight", [10.0, 0.123456])
def test_no_panel_of_a_training_covers_another(weight):
    figure = training_figure(arrest_log(30, every=1000), rgkd_weight=weight, replay_threshold=0.123)
    figure.draw_without_rendering()
    accuracy, loss, drift, replay = figure.axes
    boxes = [axes.get_tightbbox() for axes in (accuracy, loss, drift)] + [figure.legends[0].get_window_extent()]
    assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.padded(-1).overlaps(b.padded(-1))]
    assert replay.get_tightbbox().x1 <= figure.bbox.x1
    for axes in (loss, drift):
        assert axes.get_legend().get_window_extent().y0 >= axes.get_window_extent().y1


def test_training_refuses_what_cannot_be_drawn():
    empty = {"phase": "robust", "step": 1, "lr": 0.1, "loss": None, "clean_accuracy": float("inf")}
    for log in ([], arrest_log(0), [empty], [{"phase": "robust", "loss": 1.0}]):
        with pytest.raises(ValueError, match="nothing to draw"):
            training_figure(log, replay_threshold=0.2)


def test_the_users_settings_neither_matter_nor_change(tmp_path):
    first = save_figure(
        eps_curve_figure({"a": CURVE}, norm="linf", eps=None, attack="PGD-20"), tmp_path / "a.png"
    ).read_bytes()
    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9, "savefig.bbox": "tight"}):
        before = dict(matplotlib.rcParams)
        second = save_figure(
            eps_curve_figure({"a": CURVE}, norm="linf", eps=None, attack="PGD-20"), tmp_path / "b.png"
        ).read_bytes()
        assert dict(matplotlib.rcParams) == before
    assert first == second


def test_names_are_never_read_as_math():
    figure = per_class_figure(ODD, [(1, 2)] * 9, [(1, 2)] * 9, **SHOWN)
    labels = figure.axes[0].get_yticklabels()
    assert [label.get_text() for label in labels[:4]] == ["$x$", "a_b^c", "猫 🐱", "line break"]
    assert labels[4].get_text().endswith("W…")
    assert not any(label.get_parse_math() for label in labels)
    curves = dict.fromkeys(ODD, CURVE)
    assert legend_texts(eps_curve_figure(curves, norm="linf", eps=None, attack="$"))[6] == "_hidden"


def test_neither_pyplot_nor_torch_is_imported():
    code = "import sys, arrest_hub.training_figure; sys.exit(bool({'matplotlib.pyplot', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
