"""Which images the pictures show, and what they count."""

from fractions import Fraction

import numpy as np
import torch
from accelerate import Accelerator
from tiny import patterns, robust_net

from arrest_hub.evaluator import Evaluator, TensorImages
from arrest_hub.evidence import _gallery_positions, class_name_function, draw, measure_curve, per_class_counts
from arrest_hub.journal import Journal
from arrest_hub.verdicts import Verdicts


def make(label, prediction, **columns):
    broken_by = {name.replace("_", "-"): np.array(values, dtype=object) for name, values in columns.items()}
    return Verdicts(np.arange(len(label)), np.array(label), np.array(prediction), broken_by)


def test_the_gallery_prefers_what_pgd_broke_and_one_of_each_class():
    label = [0, 0, 0, 1, 1, 2, 2, 2]
    prediction = [0, 0, 0, 1, 0, 2, 2, 2]
    pgd = ["pgd-20", "pgd-20", None, "pgd-20", "clean", None, None, None]
    auto = ["apgd-ce", "apgd-ce", None, "apgd-ce", "clean", "fab-t", None, None]
    # 0 and 3: the first of their classes to fall to PGD; 1: another; 5: fallen to AutoAttack; 2 and 6: standing
    assert _gallery_positions(make(label, prediction, pgd_20=pgd, autoattack=auto)) == [0, 3, 1, 5, 2, 6]
    assert _gallery_positions(make([0, 1], [1, 0])) == [0, 1], "nothing is right: still a picture"


def test_what_is_drawn_is_of_every_class_whatever_their_order():
    for labels in ([i % 10 for i in range(2000)], [i // 200 for i in range(2000)]):  # in turns, and one after another
        drawn = draw(range(2000), 200, seed=0)
        assert len(set(drawn)) == 200
        assert drawn == sorted(drawn)
        assert all(8 <= sum(labels[i] == k for i in drawn) <= 35 for k in range(10))
    assert draw(range(2000), 200, seed=0) == drawn != draw(range(2000), 200, seed=1)
    assert draw([3, 4], 5, seed=0) == [3, 4]


def test_counts_by_class():
    verdicts = make([0, 0, 1, 1], [0, 1, 1, 1], pgd_5=["pgd-5", "clean", None, "pgd-5"])
    clean, robust = per_class_counts(verdicts, "pgd-5", 3)
    assert clean == [(1, 2), (2, 2), (0, 0)]
    assert robust == [(0, 2), (1, 2), (0, 0)]


def test_the_curve_falls_from_clean_accuracy_to_nothing():
    accelerator = Accelerator(cpu=True)
    pixels, labels = patterns(40, 4, seed=7)
    labels[:4] = (labels[:4] + 1) % 4
    evaluator = Evaluator(
        robust_net(), TensorImages(pixels, labels), accelerator, Journal(None, {}, accelerator), batch_size=16
    )
    radii = [Fraction(i * 20, 255) for i in range(4)]
    points = measure_curve(evaluator, range(40), radii, norm="linf", seed=0, name="model")
    with torch.no_grad():
        right = int((robust_net()(pixels).argmax(1) == labels).sum())
    assert [point.eps for point in points] == ["0", "20/255", "40/255", "60/255"]
    assert points[0].correct == right < 40
    assert points[1].correct > points[2].correct >= points[3].correct == 0
    assert {point.n for point in points} == {40}


def test_a_curve_that_begins_later_does_not_revive_what_is_wrong_when_clean():
    accelerator = Accelerator(cpu=True)

    class Constant(torch.nn.Module):
        """Right about noise alone; without a gradient."""

        def forward(self, x):
            noisy = (x.flatten(1).std(dim=1) > 1e-4).float()
            return torch.stack([noisy, 1 - noisy], dim=1) + 0 * x.flatten(1).sum(dim=1, keepdim=True)

    images = TensorImages(torch.full((6, 3, 8, 8), 0.5), torch.zeros(6, dtype=torch.long))
    evaluator = Evaluator(Constant(), images, accelerator, Journal(None, {}, accelerator), batch_size=4)
    radii = [Fraction(4, 255), Fraction(8, 255)]
    points = measure_curve(evaluator, range(6), radii, norm="linf", seed=0, name="model")
    assert [(point.eps, point.correct, point.n) for point in points] == [("4/255", 0, 6), ("8/255", 0, 6)]


def test_classes_of_one_name_are_told_apart():
    """ImageNet has two cranes: an image that is taken for the other one is not right."""
    name = class_name_function(["crane", "robin", "crane"])
    assert [name(number) for number in range(4)] == ["crane (0)", "robin", "crane (2)", "class 3"]
    assert class_name_function(None)(1) == "class 1"
