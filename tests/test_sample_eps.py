from functools import partial

import numpy as np
import pytest
import torch
from tiny import TinyClassifier, patterns, robust_net

from arrest_hub.arrest import ArrestObjective, angular_distance
from arrest_hub.attacks import AttackResult, margin, pgd, random_in_ball
from arrest_hub.baselines import AdversarialTraining
from arrest_hub.sample_eps import eps_by_sensitivity, sensitivity, share_budget

EPS = 8 / 255


def reference_shares(values, eps, spread):
    """The same by a fine search over the factor of proportion, in float64."""
    inverse = 1 / values.double().numpy()
    low, high = eps * (1 - spread), eps * (1 + spread)
    factors = np.geomspace(low / inverse.max() + 1e-12, high / inverse.min(), 400_000)
    means = np.array([np.clip(c * inverse, low, high).mean() for c in factors[:: len(factors) // 4000]])
    rough = factors[:: len(factors) // 4000]
    c = np.interp(eps, means, rough)
    return np.clip(c * inverse, low, high)


@pytest.mark.parametrize("spread", [0.1, 0.5, 0.9])
def test_the_budget_is_shared_as_a_search_finds(spread):
    values = torch.rand(64, generator=torch.Generator().manual_seed(0)) * 20 + 0.5
    found = share_budget(values, eps=EPS, spread=spread)
    assert np.allclose(found.numpy(), reference_shares(values, EPS, spread), rtol=2e-3)
    assert found.mean().item() == pytest.approx(EPS, rel=1e-5), "the total stays"
    assert found.min() >= EPS * (1 - spread) * (1 - 1e-6)
    assert found.max() <= EPS * (1 + spread) * (1 + 1e-6)
    inside = (found > EPS * (1 - spread) * 1.001) & (found < EPS * (1 + spread) * 0.999)
    products = (found * values)[inside]
    assert inside.any()
    assert torch.allclose(products, products[:1].expand_as(products), rtol=1e-4)


def test_equal_sensitivities_share_equally():
    assert torch.allclose(share_budget(torch.full((5,), 3.0), eps=EPS, spread=0.5), torch.full((5,), EPS))
    assert torch.allclose(share_budget(torch.tensor([7.0]), eps=EPS, spread=1.0), torch.tensor([EPS]))


@pytest.mark.parametrize("spread", [0.5, 1.0])
def test_samples_without_a_gradient_get_the_most(spread):
    values = torch.tensor([0.0, 1.0, 2.0, 4.0])
    found = share_budget(values, eps=EPS, spread=spread)
    assert found.isfinite().all()
    assert found[0].item() == pytest.approx(EPS * (1 + spread), rel=1e-5)
    assert found.mean().item() == pytest.approx(EPS, rel=1e-4)
    assert torch.allclose(share_budget(torch.zeros(4), eps=EPS, spread=spread), torch.full((4,), EPS), rtol=1e-4)


@pytest.mark.parametrize("spread", [0.3, 0.5, 1.0])
def test_the_total_stays_where_most_have_no_gradient(spread):
    values = torch.cat([torch.zeros(90), torch.linspace(0.5, 1.5, 38)])
    found = share_budget(values, eps=EPS, spread=spread)
    assert found.mean().item() == pytest.approx(EPS, rel=1e-4)
    assert torch.equal(found[:90], found[:1].expand(90))
    assert (found[90:] <= found[0]).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_sensitivity_is_the_slope_in_the_worst_direction(norm):
    net = robust_net().double()
    pixels, labels = patterns(6, 4)
    pixels = pixels.double()
    found = sensitivity(net, pixels, labels, norm=norm)
    here = pixels.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(margin(net(here), labels).sum(), here)
    if norm == "linf":
        direction = gradient.sign()
    else:
        direction = gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    step = 1e-4
    with torch.no_grad():
        slope = (margin(net(pixels + step * direction), labels) - margin(net(pixels), labels)) / step
    assert torch.allclose(found.double(), slope.double(), rtol=2e-2)
    scaled = sensitivity(net, pixels, labels, norm=norm, gradient_scale=128.0)
    assert torch.allclose(found, scaled, rtol=1e-5)


def test_unknown_norm():
    with pytest.raises(ValueError, match="l3"):
        sensitivity(robust_net(), torch.rand(1, 3, 8, 8), torch.tensor([0]), norm="l3")


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("options", [{}, {"images_at_once": 3}, {"stop_after": 1}], ids=str)
def test_an_attack_with_a_radius_for_each_equals_attacks_one_by_one(norm, options):
    net = robust_net()
    pixels, labels = patterns(8, 4, seed=3)
    radii = torch.linspace(0.2, 1.8, 8) * (EPS if norm == "linf" else 0.4)
    shared = {"step_size": None, "steps": 4, "norm": norm, "start": pixels, **options}
    found = pgd(net, pixels, labels, eps=radii, **shared)
    for i, radius in enumerate(radii.tolist()):
        one = {**shared, "start": pixels[i : i + 1]}
        alone = pgd(net, pixels[i : i + 1], labels[i : i + 1], eps=radius, **one)
        assert torch.allclose(found.adversarial[i], alone.adversarial[0], atol=1e-6)
        assert found.steps[i] == alone.steps[0]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_random_start_is_inside_each_ball(norm):
    pixels = torch.full((4, 3, 8, 8), 0.5)
    radii = torch.tensor([0.01, 0.05, 0.1, 0.2])
    delta = random_in_ball(pixels, eps=radii, norm=norm, generator=torch.Generator().manual_seed(0)) - pixels
    sizes = delta.flatten(1).norm(dim=1, p=torch.inf if norm == "linf" else 2)
    assert (sizes <= radii * (1 + 1e-5)).all()
    assert (sizes >= 0.9 * radii).all(), "and not in a smaller one"


def seen_radii(objective_of, count=12):
    """The radii an objective attacks with, and those of its batch."""
    student = TinyClassifier().train()
    pixels, labels = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(5)), torch.arange(count) % 3
    seen = []

    def attack(logits_fn, some, targets, *, steps, generator=None, eps=None):
        seen.append(eps)
        zeros = torch.zeros(len(some))
        return AttackResult(some, zeros, zeros)

    radii = partial(eps_by_sensitivity, eps=EPS, spread=0.5, norm="linf")
    objective = objective_of(attack, radii)
    student.passes.clear()
    parts = objective(student, student, pixels, labels, torch.Generator().manual_seed(0))
    fresh = TinyClassifier().eval()  # the trained pass has moved the student's statistics
    whole = radii(lambda x: fresh(x).logits, pixels, labels)
    return objective, student, parts, seen, whole


def test_adversarial_training_attacks_each_image_in_its_own_ball():
    objective, student, _, seen, whole = seen_radii(
        lambda attack, radii: AdversarialTraining(attack, attack_steps=2, radii=radii)
    )
    assert torch.allclose(seen[0], whole)
    assert whole.std() > 0
    assert objective.passes["sensitivity"] == 1
    assert student.passes[0] == (12, False, True, True), "one pass, of which the pixels alone have a gradient"


@pytest.mark.parametrize("static_shapes", [False, True])
def test_arrest_shares_the_budget_over_the_batch_before_it_replays(static_shapes):
    teacher = TinyClassifier(seed=1).eval().requires_grad_(False)
    with torch.no_grad():
        pixels = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(5))
        drift = angular_distance(TinyClassifier().eval()(pixels).representation, teacher(pixels).representation)
    objective, _, parts, seen, whole = seen_radii(
        lambda attack, radii: ArrestObjective(
            teacher, attack, partial(random_in_ball, eps=EPS, norm="linf"), rgkd_weight=1.0,
            replay_threshold=drift.median().item(), attack_steps=2, radii=radii, static_shapes=static_shapes,
        )
    )  # fmt: skip
    assert objective.passes["sensitivity"] == 1
    expected = whole if static_shapes else whole[parts["replayed"] == 0]
    assert torch.allclose(seen[0], expected)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_sample_whose_gradient_overflows_is_as_sensitive_as_any(norm):
    """As in fp16, where it would be steepest; not as one without a gradient, which gets the largest eps."""
    net, (pixels, labels) = robust_net(), patterns(6, 4)
    steep = torch.tensor([1e38, 1.0, 1.0, 1.0, 1.0, 1.0]).unsqueeze(1)
    plain = sensitivity(net, pixels, labels, norm=norm)
    found = sensitivity(lambda x: net(x) * steep, pixels, labels, norm=norm, gradient_scale=128.0)
    assert torch.allclose(found[1:], plain[1:], rtol=1e-4)
    assert found[0] == found[1:].max()
    eps = eps_by_sensitivity(
        lambda x: net(x) * steep, pixels, labels, eps=EPS, spread=0.5, norm=norm, gradient_scale=128.0
    )
    assert eps[0] == eps.min() < EPS
    none = sensitivity(lambda x: net(x) * 1e38, pixels, labels, norm=norm, gradient_scale=128.0)
    assert torch.equal(none, torch.zeros(6)), "nothing is known: an eps for all"


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_random_start_goes_in_every_direction(norm):
    pixels, eps = torch.full((64, 3, 8, 8), 0.5), torch.full((64,), 0.1)
    start = random_in_ball(pixels, eps=eps, norm=norm, generator=torch.Generator().manual_seed(0)) - pixels
    assert start.mean().abs() < 5e-3, "a start to one side has a mean of 0.05 in linf"


def test_the_sensitivity_in_fp16_is_of_the_scaled_margin():
    """The margin's gradient to the logits has an L1 norm of 2."""
    net, (pixels, labels), seen = robust_net(), patterns(4, 4), []

    def logits_of(images):
        logits = net(images)
        logits.register_hook(lambda gradient: seen.append(gradient.abs().sum(1)))
        return logits

    eps_by_sensitivity(logits_of, pixels, labels, eps=EPS, spread=0.5, norm="linf", gradient_scale=64.0)
    assert seen[0].allclose(torch.full((4,), 128.0))
