"""A masked model is flagged, and by which check; an honestly trained one is not."""

import pytest
import torch
from tiny import LogitsOnly, patterns, robust_net

import arrest_hub
from arrest_hub.attack_stages import AttackOutcome
from arrest_hub.eval_session import _strongest
from arrest_hub.masking import _loose_check, autoattack_checks, ball_check, chance_check, share_check, unbounded_eps


def checks(model, teacher=None, attacks="pgd-10", **options):
    pair = patterns(40, 4, seed=7)
    report = arrest_hub.evaluate(model, pair, attacks=attacks, eps="28/255", teacher=teacher, **options)
    return {check.name: check for check in report.checks}


def warnings(found):
    return {name for name, check in found.items() if check.status == "warn"}


def test_an_honestly_trained_model_is_not_flagged():
    found = checks(robust_net(), teacher=robust_net(), attacks="pgd-50")
    assert not warnings(found)
    assert {check.status for check in found.values()} == {"pass"}
    assert 0 < checks(robust_net())["noise does not hurt more than PGD"].value + 1 < 1, "PGD does break some"
    assert found["robust accuracy falls to 0 as eps grows"].value == 0


@pytest.mark.parametrize(
    ("change", "signs"),
    [
        (lambda z: (2 * z).round(), {"share of zero gradients", "robust accuracy falls to 0 as eps grows",
                                     "white-box beats transfer from the teacher"}),
        (lambda z: 1e4 * z, {"share of zero gradients"}),
        (lambda z: z.softmax(1), {"AutoAttack's flag: probabilities"}),
        (lambda z: z + 3 * torch.randn_like(z), {"AutoAttack's flag: randomized"}),
        (lambda z: z.detach() + 0 * z, {"share of zero gradients", "white-box beats transfer from the teacher"}),
    ],
    ids=["quantised", "scaled", "probabilities", "random", "detached"],
)  # fmt: skip
def test_a_masked_model_is_flagged(change, signs):
    found = checks(LogitsOnly(robust_net(), change), teacher=robust_net())
    assert signs <= warnings(found)
    for name in signs:
        assert found[name].value > 0


def test_a_share_at_its_limit_passes():
    """Differences of shares are rounded: 60 of 100 and 59 of 100 are one image apart."""
    for k in range(1, 100):
        assert share_check("x", (1 - k / 100) - (1 - (k + 1) / 100), 0.01, "", "").status == "pass"
    assert share_check("x", 1 - 95 / 100, 0.05, "", "").status == "pass"
    assert share_check("x", 0.02, 0.01, "", "").status == "warn"


def test_gradients_that_are_nan_are_none():
    def undefined(z):
        return z + (z - z).pow(2).sum(dim=1, keepdim=True).sqrt()

    assert "share of zero gradients" in warnings(checks(LogitsOnly(robust_net(), undefined)))


class Backwards(torch.autograd.Function):
    """The identity, with the gradient turned round: following it makes the loss smaller."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


def test_a_gradient_that_misleads_is_flagged():
    """Noise and transfer hurt more than an attack that is led the wrong way."""
    net = robust_net()
    model = torch.nn.Sequential(LogitsOnly(net, Backwards.apply))
    found = arrest_hub.evaluate(
        model, patterns(40, 4, seed=7), attacks="pgd-10", eps="90/255", teacher=robust_net()
    )  # fmt: skip
    assert {"white-box beats transfer from the teacher", "robust accuracy falls to 0 as eps grows"} <= {
        check.name for check in found.warnings
    }


class Calm(torch.nn.Module):
    """Class 0 for images without noise; its gradient leads to them, whatever is wanted."""

    def forward(self, x):
        excess = x.flatten(1).std(dim=1) - 0.03
        return Backwards.apply(torch.stack([-excess, excess], dim=1))


@pytest.mark.parametrize(("steps", "misleading"), [(1, True), (3, False)])
def test_attacks_that_lead_away_are_flagged(steps, misleading):
    """The noise of the start breaks all images; three steps take it away again, one does not."""
    pair = torch.full((8, 3, 8, 8), 0.5), torch.zeros(8, dtype=torch.long)
    options = {"eps": "16/255", "pgd_step_size": "2/255", "teacher": None}
    report = arrest_hub.evaluate(Calm(), pair, attacks=f"pgd-{steps}", **options)
    found = {check.name: check.status for check in report.checks}
    assert found["noise does not hurt more than PGD"] == "warn"
    assert found["more steps are never weaker"] == ("warn" if misleading else "pass")


def test_a_network_that_looks_at_some_pixels_has_a_gradient():
    mask = torch.zeros(3, 8, 8)
    mask[:, :4] = 1
    model = torch.nn.Sequential(LogitsOnly(robust_net()))
    model.register_forward_pre_hook(lambda module, inputs: (inputs[0] * mask,))
    assert checks(model)["share of zero gradients"].value == 0.0


class SeededByTheImage(torch.nn.Module):
    """Noise on the logits, the same for the same image: a defence that no second look gives away."""

    def __init__(self):
        super().__init__()
        self.net = robust_net()

    def forward(self, pixels):
        noise = (pixels.flatten(1).double() * torch.arange(1, 193)).sum(dim=1, keepdim=True) * 1e6
        return self.net(pixels) + 2 * torch.cat([noise.sin(), (2 * noise).sin(), (3 * noise).sin(), noise.cos()], 1)


def test_logits_that_jump_are_flagged():
    name = "a tiny change of the pixels changes the logits little"
    assert name in warnings(checks(SeededByTheImage()))
    assert 0 < checks(robust_net())[name].value < 1e-3
    assert name in warnings(checks(SeededByTheImage(), precision="bf16"))
    rounded = checks(robust_net(), precision="bf16")
    assert name not in warnings(rounded)
    assert rounded[name].value > checks(robust_net())[name].value, "rounding alone is more than the change"


def test_logits_that_depend_on_the_batch_are_flagged():
    name = "an image's logits do not depend on its batch"
    norm = torch.nn.BatchNorm2d(3, track_running_stats=False)
    assert name in warnings(checks(torch.nn.Sequential(norm, robust_net())))
    assert name not in warnings(checks(robust_net(), precision="bf16"))
    assert checks(robust_net())[name].value < 1e-5


def test_an_attack_that_is_too_weak_is_flagged():
    name = "the checks break little that stands {}"
    found = checks(robust_net(), attacks="pgd-1", pgd_step_size="1/255")
    assert name.format("PGD-1") in warnings(found)
    assert "measure with autoattack" in found[name.format("PGD-1")].finding
    both = checks(robust_net(), attacks="pgd-1,apgd-ce", pgd_step_size="1/255")
    assert name.format("APGD-CE") not in warnings(both), "the strongest attack is the one that counts"
    assert _loose_check(("pgd-1", {0}), {0, 1}, 3).status == "pass", "one of three is chance"
    assert _loose_check(("pgd-1", {0}), {0, 1, 2}, 4).status == "warn"
    assert "measure with autoattack" not in _loose_check(("autoattack", set()), {1, 2}, 4).finding
    assert not [name for name in checks(robust_net(), attacks="clean,noise") if name.startswith("the checks break")]


def test_without_a_teacher_or_for_l1_checks_are_skipped_and_say_so():
    found = checks(robust_net())
    assert found["white-box beats transfer from the teacher"].status == "skipped"
    pair = patterns(8, 4)
    report = arrest_hub.evaluate(robust_net(), pair, attacks="apgd-ce", norm="l1", eps="5", teacher=None)
    skipped = [check for check in report.checks if check.status == "skipped"]
    assert [check.value for check in skipped] == [None]
    assert "linf and l2" in skipped[0].finding


def test_chance():
    assert chance_check(12, 100, 10).status == "warn"
    assert "normalise" in chance_check(12, 100, 10).finding
    assert chance_check(40, 100, 10).status == "pass"


def outcome(broken, parts=(), largest=0.1, inside=True):
    parameters = {"parts": [{"name": name, "broken": count} for name, count in parts]}
    return AttackOutcome(dict.fromkeys(broken, "x"), 1.0, parameters, largest, inside)


def test_the_ball():
    assert ball_check({"pgd-20": outcome([1], largest=0.1)}, 0.1).status == "pass"
    assert ball_check({"pgd-20": outcome([1], largest=0.11)}, 0.1).status == "warn"
    assert ball_check({"pgd-20": outcome([1], inside=False)}, 0.1).status == "warn"


def test_autoattack_against_pgd_and_square():
    auto = outcome(range(40), [("apgd-ce", 40), ("square", 0)])

    def by_name(pgd):
        return {check.name: check for check in autoattack_checks({"pgd-20": pgd, "autoattack": auto}, 100, 90)}

    assert {check.status for check in by_name(outcome(range(38))).values()} == {"pass"}
    weak = by_name(outcome(range(44)))
    assert weak["AutoAttack is no weaker than PGD-20"].status == "warn"
    assert weak["AutoAttack is no weaker than PGD-20"].value == 0.04
    square = autoattack_checks({"autoattack": outcome(range(40), [("apgd-ce", 38), ("square", 2)])}, 100, 90)
    assert next(check for check in square if "Square" in check.name).status == "warn"
    assert autoattack_checks({"pgd-20": auto}, 100, 90) == []


def test_the_strongest_attack_is_that_which_broke_most_and_noise_is_none():
    found = {"noise": outcome(range(9)), "pgd-5": outcome([1, 2]), "apgd-ce": outcome([1, 2, 3])}
    assert _strongest(found) == ("apgd-ce", {1, 2, 3})
    assert _strongest({"noise": outcome([1])}) is None


def test_everything_can_be_made_grey_within_the_large_radius():
    for norm, p in (("linf", float("inf")), ("l2", 2), ("l1", 1)):
        corner = torch.full((192,), 0.5)
        assert torch.linalg.vector_norm(corner, p) <= unbounded_eps(norm, 192) * (1 + 1e-6)
