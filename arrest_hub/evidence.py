"""What goes into the pictures of an evaluation: accuracy over eps, drift from the teacher, a gallery of examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arrest_hub.arrest import angular_distance
from arrest_hub.attack_stages import ThreatModel, pgd_attack
from arrest_hub.attacks import frozen_eval
from arrest_hub.backbones import Backbone
from arrest_hub.data import to_pixels
from arrest_hub.eval_config import fraction_name
from arrest_hub.evaluator import Attacked, AttackFn, Evaluator
from arrest_hub.figures import (
    GalleryRow,
    PlotPoint,
    drift_figure,
    eps_curve_figure,
    gallery_figure,
    per_class_figure,
    save_figure,
)
from arrest_hub.results import CurvePoint, Result, result_title
from arrest_hub.verdicts import Verdicts

CURVE_STEPS = 20
GALLERY_IMAGES = 6


def draw(positions: Sequence[int], count: int, seed: int) -> list[int]:
    """``count`` of the positions at random, in their order (all, if there are no more). Evenly spaced ones would all be
    of one class where the classes take turns."""
    if len(positions) <= count:
        return list(positions)
    chosen = np.random.default_rng(seed).choice(len(positions), count, replace=False)
    return [positions[i] for i in np.sort(chosen)]


def measure_curve(
    evaluator: Evaluator, positions: Sequence[int], radii: Sequence[Fraction], *, norm: str, seed: int, name: str
) -> list[CurvePoint]:
    """Accuracy under PGD-20 (step eps / 4) at rising radii, of the images at ``positions``.

    An image that fell at one radius counts as fallen at every larger one, whose ball holds the smaller ball; an image
    that is wrong when clean has fallen at all of them.
    """
    standing, points = list(positions), []
    for radius in sorted({Fraction(0), *radii}):
        eps = float(radius)
        threat = ThreatModel(norm, eps)
        attack = (
            pgd_attack(
                evaluator.classify, threat, steps=CURVE_STEPS, step_size=eps / 4, seed=seed, name=f"curve {radius}"
            )
            if eps
            else _unchanged
        )
        title = f"eps {fraction_name(radius)}"
        run = evaluator.attack(
            f"eps_curve/{name}/{radius}", standing, attack, title=title, passes=CURVE_STEPS + 1, of=len(positions)
        )
        broken = set(run.broken)
        standing = [position for position in standing if position not in broken]
        if radius in radii:
            points.append(CurvePoint(fraction_name(radius), len(standing), len(positions)))
    return points


def _unchanged(pixels: Tensor, labels: Tensor, number: int) -> Attacked:
    return Attacked(pixels, {})


def measure_drift(
    evaluator: Evaluator,
    student: Backbone,
    teacher: Backbone,
    positions: Sequence[int],
    *,
    threat: ThreatModel,
    step_size: float,
    seed: int,
) -> dict[str, np.ndarray]:
    """Angular distance in [0, 1] between the teacher's representation of the clean image and the student's of the clean
    and of the adversarial one (PGD-20): float [N] each. Norm linf or l2."""
    pgd = pgd_attack(evaluator.classify, threat, steps=CURVE_STEPS, step_size=step_size, seed=seed, name="drift")

    def run(pixels: Tensor, labels: Tensor, number: int) -> Attacked:
        adversarial = pgd(pixels, labels, number).adversarial
        with torch.no_grad():
            reference = teacher(pixels).representation
            drifts = [angular_distance(student(x).representation, reference) for x in (pixels, adversarial)]
        return Attacked(adversarial, {"drift": [[round(v, 5) for v in drift.tolist()] for drift in drifts]})

    with frozen_eval(teacher):
        outcome = evaluator.attack(
            "drift", positions, run, title="drift from the teacher", passes=CURVE_STEPS + 3, of=len(positions)
        )
    series = [np.array([v for entry in outcome.entries for v in entry["drift"][i]]) for i in range(2)]
    return {"clean images": series[0], "adversarial images": series[1]}


def gallery_rows(
    evaluator: Evaluator, verdicts: Verdicts, attack: AttackFn, class_names: Sequence[str] | None
) -> list[GalleryRow]:
    """Examples for the gallery: images that were right when clean and then broken, one a class first, then others; made
    anew with ``attack``. Runs in one process."""
    chosen = _gallery_positions(verdicts)
    name = class_name_function(class_names)
    rows: list[GalleryRow] = []
    with evaluator.ready():
        items = [evaluator.images[position] for position in chosen]
        pixels = torch.stack([torch.as_tensor(item["pixels"]) for item in items])
        pixels = to_pixels(pixels.to(evaluator.accelerator.device))
        labels = torch.tensor([int(item["label"]) for item in items], device=pixels.device)
        adversarial = attack(pixels, labels, 0).adversarial
        with torch.no_grad():
            shares = [evaluator.classify(x).softmax(dim=1).max(dim=1) for x in (pixels, adversarial)]
    for i in range(len(chosen)):
        clean, perturbed = (_picture(x[i]) for x in (pixels, adversarial))
        rows.append(
            GalleryRow(
                clean,
                perturbed,
                name(int(labels[i])),
                name(int(shares[0].indices[i])),
                name(int(shares[1].indices[i])),
                float(shares[0].values[i]),
                float(shares[1].values[i]),
            )
        )
    return rows


def _gallery_positions(verdicts: Verdicts) -> list[int]:
    """Fallen to PGD (with which the gallery is made), then fallen to another attack, then standing, then wrong when
    clean; among equals one of each class first."""
    pgd = next((column for name, column in verdicts.broken_by.items() if name.startswith("pgd-")), None)
    first, right = verdicts.first_broken_by(), verdicts.clean_correct
    seen: Counter[tuple[int, int]] = Counter()
    keys = []
    for position, label in enumerate(verdicts.label.tolist()):
        if not right[position]:
            rank = 3
        elif pgd is not None and pgd[position] is not None:
            rank = 0
        else:
            rank = 1 if first[position] is not None else 2
        seen[rank, label] += 1
        keys.append((rank, seen[rank, label], position))
    return [position for _, _, position in sorted(keys)[:GALLERY_IMAGES]]


def _picture(pixels: Tensor) -> np.ndarray:
    """[C, H, W] in [0, 1] -> [H, W, 3]."""
    array = pixels.detach().cpu().permute(1, 2, 0).numpy()
    return array if array.shape[2] == 3 else np.repeat(array[:, :, :1], 3, axis=2)


def class_name_function(names: Sequence[str] | None) -> Any:
    """Output number -> what to call it; with the number where several have one name (ImageNet's two cranes)."""
    counts = Counter(names or ())

    def call(number: int) -> str:
        if names is None or number >= len(names):
            return f"class {number}"
        name = str(names[number])
        return name if counts[names[number]] == 1 else f"{name} ({number})"

    return call


def per_class_counts(verdicts: Verdicts, attack: str, num_classes: int) -> tuple[list[tuple[int, int]], ...]:
    """(clean, robust), each (correct, n) for every class."""
    counts = []
    for right in (verdicts.clean_correct, verdicts.stands(attack)):
        counts.append([(int(right[verdicts.label == c].sum()), int((verdicts.label == c).sum()))
                       for c in range(num_classes)])  # fmt: skip
    return tuple(counts)


def draw_figures(
    folder: Path,
    *,
    verdicts: Verdicts,
    strongest: Result | None,
    threat: ThreatModel,
    eps: str,
    num_classes: int,
    class_names: Sequence[str] | None,
    curve: Mapping[str, Sequence[CurvePoint]],
    gallery: Sequence[GalleryRow],
    drifts: Mapping[str, np.ndarray],
    replay_threshold: float | None,
) -> list[Path]:
    """Draw what there is to draw into ``folder``; the classes are counted by ``strongest``'s attack."""
    figures = {}
    if curve:
        curves = {name: [PlotPoint(float(Fraction(p.eps)), p.correct, p.n) for p in points]
                  for name, points in curve.items()}  # fmt: skip
        figures["eps_curve"] = eps_curve_figure(curves, norm=threat.norm, eps=threat.eps, attack=f"PGD-{CURVE_STEPS}")
    if strongest is not None and strongest.attack is not None:
        clean, robust = per_class_counts(verdicts, strongest.attack, num_classes)
        names = [*map(class_name_function(class_names), range(num_classes))]
        figures["per_class"] = per_class_figure(
            names, clean, robust, attack=result_title(strongest), eps=eps, norm=threat.norm
        )
    if gallery:
        figures["gallery"] = gallery_figure(gallery, eps=eps, norm=threat.norm)
    if drifts:
        figures["drift"] = drift_figure(drifts, threshold=replay_threshold)
    return [save_figure(figure, folder / f"{name}.png") for name, figure in figures.items()]
