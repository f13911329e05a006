"""One stage of an evaluation: what it says of the images that an attack broke, and of the teacher beside the model."""

import time

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tiny import patterns, robust_net, smooth_net

import arrest_hub
from arrest_hub import attack_stages, eval_session, masking
from arrest_hub.attack_stages import part_attack, pgd_attack
from arrest_hub.evaluator import Attacked, Evaluator, TensorImages, _seconds, logits_function, perturbation_size
from arrest_hub.journal import Journal


class Brightness(torch.nn.Module):
    """Class 1 for images brighter than a half."""

    def forward(self, x):
        mean = x.flatten(1).mean(dim=1)
        return torch.stack([0.5 - mean, mean - 0.5], dim=1)


def stage(attack, norm="linf"):
    """What `Evaluator.attack` finds on three dark images."""
    accelerator = Accelerator(cpu=True)
    images = TensorImages(torch.full((3, 3, 8, 8), 0.4), torch.zeros(3, dtype=torch.long))
    evaluator = Evaluator(Brightness(), images, accelerator, Journal(None, {}, accelerator), batch_size=2, norm=norm)
    return evaluator.attack(
        "pgd", range(3), lambda x, y, number: Attacked(attack(x, number), {}), title="PGD", passes=1, of=3
    )


@pytest.mark.parametrize(("norm", "size"), [("linf", 0.2), ("l2", 0.2 * 192**0.5), ("l1", 0.2 * 192)])
def test_the_largest_perturbation_is_of_what_it_broke(norm, size):
    """The second image is moved by more, and stands."""
    moves = torch.tensor([0.2, -0.4]).view(2, 1, 1, 1)
    found = stage(lambda x, number: x + moves[: len(x)] * (number == 0), norm)
    assert found.broken == [0]
    assert found.largest == pytest.approx(size, rel=1e-5)
    difference = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    order = {"linf": np.inf, "l2": 2, "l1": 1}[norm]
    expected = [np.linalg.norm(one.flatten().double().numpy(), order) for one in difference]
    assert perturbation_size(difference, norm).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("value", "inside"), [(0.0, True), (1.0, True), (-0.01, False), (1.01, False)])
def test_pixels_outside_of_their_range_are_seen(value, inside):
    def attack(x, number):
        x = x.clone()
        x[0, 0, 0, 0] = value
        return x

    assert all(entry["inside"] for entry in stage(attack).entries) == inside


def test_seconds_are_shared_by_the_processes_that_worked():
    assert _seconds([{"seconds": 3.0, "processes": 2}, {"seconds": 1.0, "processes": 1}]) == 2.5


def test_channels_last_and_bf16_compute_the_same_pixels():
    """Gradients and logits of a layout and a precision, whatever autograd wants the pixels for."""
    net, (pixels, _) = torch.nn.Conv2d(3, 4, 3), patterns(4, 4)
    flat = torch.nn.Sequential(net, torch.nn.Flatten())
    device = torch.device("cpu")
    plain, other, rounded = (
        logits_function(flat, device=device, **options)
        for options in ({}, {"channels_last": True}, {"precision": "bf16"})
    )
    gradients = []
    for classify in (plain, other, rounded):
        here = pixels.clone().requires_grad_(True)
        logits = classify(here)
        assert logits.dtype == torch.float32
        gradients.append(torch.autograd.grad(logits.square().sum(), here)[0])
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[0], gradients[2], rtol=0.1, atol=0.05)
    assert not torch.equal(gradients[0], gradients[2])


def test_the_teachers_figures_are_those_of_an_evaluation_of_its_own():
    options = {"attacks": "noise,pgd-4", "eps": "28/255", "pgd_step_size": "8/255", "pgd_restarts": 8, "seed": 3,
               "checks": False}  # fmt: skip
    pair = patterns(48, 4, seed=7)
    beside = arrest_hub.evaluate(smooth_net(4), pair, teacher=robust_net(), **options)
    alone = arrest_hub.evaluate(robust_net(), pair, teacher=None, **options)
    assert [row.correct for row in beside.teacher_results] == [row.correct for row in alone.results]
    assert [row.attack_parameters for row in beside.teacher_results] == [row.attack_parameters for row in alone.results]
    for change in ({"pgd_restarts": 1}, {"pgd_step_size": "1/255"}):
        other = arrest_hub.evaluate(robust_net(), pair, teacher=None, **(options | change))
        assert other.results[-1].correct != alone.results[-1].correct, "what this test could not see otherwise"
    assert beside.results[0].correct != alone.results[0].correct


def attacks_of_the_checks(monkeypatch, **options):
    """The settings of every PGD that the checks run, by how many steps it has, and the images they look at."""
    found, drawn, plain = [], [], masking.masking_checks

    def remembered(classify, threat, **settings):
        found.append((settings["steps"], settings["step_size"], settings.get("restarts", 1), threat.eps,
                      "source" in settings))  # fmt: skip
        return pgd_attack(classify, threat, **settings)

    def checks(evaluator, positions, *args, **settings):
        drawn.extend(positions)
        return plain(evaluator, positions, *args, **settings)

    monkeypatch.setattr(masking, "pgd_attack", remembered)
    monkeypatch.setattr(eval_session, "masking_checks", checks)

    def part(suite, name):
        if name == "square":
            assert suite.suite.square.n_queries == 5
        return part_attack(suite, name)

    monkeypatch.setattr(masking, "part_attack", part)
    monkeypatch.setattr(masking, "SQUARE_QUERIES", 5)
    arrest_hub.evaluate(robust_net(), patterns(40, 4, seed=7), eps="28/255", check_images=8, **options)
    return found, drawn


def test_the_checks_attack_as_the_evaluation_does_and_harder(monkeypatch):
    found, drawn = attacks_of_the_checks(
        monkeypatch, attacks="noise,pgd-4", pgd_step_size="5/255", teacher=smooth_net(4), seed=1
    )
    eps, step = 28 / 255, 5 / 255
    assert found == [
        (4, pytest.approx(step), 1, pytest.approx(eps), False),
        (12, pytest.approx(step), 1, pytest.approx(eps), False),
        (12, 0.05, 5, 0.5, False),  # in the ball in which every image can be made grey
        (4, pytest.approx(step), 1, pytest.approx(eps), True),
    ]
    assert len(drawn) == 8
    assert drawn != list(range(8)), "drawn from all of them"
    _, others = attacks_of_the_checks(monkeypatch, attacks="noise,pgd-4", teacher=None, seed=2)
    assert others != drawn


@pytest.mark.parametrize(("classes", "parts"), [(4, ["apgd-dlr", "square"]), (2, ["apgd-ce", "square"])])
def test_square_is_compared_with_the_strongest_gradients_that_the_classes_allow(monkeypatch, classes, parts):
    found = []

    def part(suite, name):
        found.append(name)
        return part_attack(suite, name)

    monkeypatch.setattr(masking, "part_attack", part)
    monkeypatch.setattr(masking, "SQUARE_QUERIES", 5)
    pair = patterns(8, classes, seed=7)
    arrest_hub.evaluate(robust_net(classes), pair, attacks="pgd-2", eps="4/255", teacher=None)
    assert found == parts


def test_the_checks_without_pgd_take_twenty_steps(monkeypatch):
    found, _ = attacks_of_the_checks(monkeypatch, attacks="apgd-ce", teacher=None)
    assert [steps for steps, *_ in found] == [20, 60, 60]


def test_the_gallery_is_of_fifty_steps_of_the_evaluations_pgd(monkeypatch, tmp_path):
    found = []

    def remembered(*args, **settings):
        found.append((settings["name"], settings["steps"], settings["step_size"], settings["seed"]))
        return pgd_attack(*args, **settings)

    monkeypatch.setattr(eval_session, "pgd_attack", remembered)
    monkeypatch.setattr(attack_stages, "pgd_attack", remembered)
    arrest_hub.evaluate(
        robust_net(), patterns(12, 4, seed=7), eps="28/255", attacks="pgd-4", pgd_step_size="5/255", seed=6,
        teacher=None, checks=False, output_dir=tmp_path / "out",
    )  # fmt: skip
    assert found == [("pgd-4", 4, pytest.approx(5 / 255), 6), ("gallery", 50, pytest.approx(5 / 255), 6)]


def test_the_curve_is_drawn_by_the_evaluations_seed_and_norm(monkeypatch):
    found, plain = [], eval_session.measure_curve

    def measured(evaluator, positions, radii, *, norm, seed, name):
        found.append((name, norm, seed, len(positions)))
        return plain(evaluator, positions, radii, norm=norm, seed=seed, name=name)

    monkeypatch.setattr(eval_session, "measure_curve", measured)
    report = arrest_hub.evaluate(
        robust_net(), patterns(12, 4, seed=7), eps="0.5", norm="l2", attacks="pgd-1", teacher=smooth_net(4),
        checks=False, eps_curve="0:0.5:2", curve_images=6, seed=9,
    )  # fmt: skip
    assert found == [("student", "l2", 9, 6), ("teacher", "l2", 9, 6)]
    assert list(report.eps_curve) == ["student", "teacher"]


def test_the_first_batch_is_no_measure_of_speed():
    class Slow(torch.nn.Module):
        calls = 0

        def forward(self, pixels):
            self.calls += 1
            time.sleep(0.5 if self.calls == 1 else 0.0)
            return pixels.flatten(1)[:, :2]

    accelerator = Accelerator(cpu=True)
    images = TensorImages(torch.rand(6, 3, 8, 8), torch.zeros(6, dtype=torch.long))
    found = Evaluator(Slow(), images, accelerator, Journal(None, {}, accelerator), batch_size=2).clean()
    assert found.seconds > 0.5
    assert found.images_per_second > 6 / found.seconds
