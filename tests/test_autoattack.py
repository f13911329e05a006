"""Part by part and batch by batch, AutoAttack gives what a direct call of pyautoattack gives."""

import sys

import pytest
import torch
from pyautoattack import AutoAttack
from tiny import LogitsOnly, patterns, robust_net

from arrest_hub.attacks import frozen_eval
from arrest_hub.autoattack import (
    AutoAttackParts,
    collect_warnings,
    model_flags,
    part_problem,
    square_flag,
    standard_parts,
)
from arrest_hub.eval_config import EvalConfig
from arrest_hub.evaluation import run_evaluation

RADII = {"linf": "26/255", "l2": "1.1", "l1": "5"}


def ours(net, pair, **options):
    config = EvalConfig(model="net", dataset="given", attacks="autoattack", checks=False, teacher=None, **options)
    return run_evaluation(config, module=net, pair=pair, write=False)


@pytest.mark.parametrize("norm", ["linf", "l2", pytest.param("l1", marks=pytest.mark.slow)])
def test_verdicts_are_those_of_a_direct_call(norm, few_queries):
    net, (pixels, labels) = robust_net(4), patterns(20 if norm == "l1" else 32, 4, seed=7)
    labels[3] = (labels[3] + 1) % 4  # one that is wrong when clean
    eps = EvalConfig(norm=norm, eps=RADII[norm]).eps_value
    suite = AutoAttack(net, norm={"linf": "Linf", "l2": "L2", "l1": "L1"}[norm], eps=eps, seed=5, version="standard")
    suite.apgd_targeted.n_target_classes = suite.fab.n_target_classes = 3
    with frozen_eval(net), collect_warnings():
        adversarial, _ = suite.run_standard_evaluation(pixels, labels, batch_size=16)
        stands = (net(adversarial).argmax(1) == labels) & (net(pixels).argmax(1) == labels)
    found = ours(net, (pixels, labels), norm=norm, eps=RADII[norm], seed=5, batch_size=16)
    assert torch.equal(torch.from_numpy(found.verdicts.stands("autoattack")), stands)
    assert 3 < stands.sum() < len(labels) - 3
    row = found.report.get("robust_accuracy")
    assert row.correct == stands.sum()
    parts = row.attack_parameters["parts"]
    assert [part["name"] for part in parts] == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert parts[1]["target_classes"] == parts[2]["target_classes"] == 3
    assert parts[1]["attacked"] == parts[0]["attacked"] - parts[0]["broken"], "only those standing go on"
    assert sum(part["broken"] for part in parts) == len(labels) - 1 - stands.sum()


def test_targets_in_the_standard_version():
    net = robust_net(10)
    parts = AutoAttackParts(net, norm="linf", eps=0.1, seed=0, num_classes=10, device="cpu")
    assert parts.parameters("apgd-t") == {
        "iterations": 100, "restarts": 1, "target_classes": 9, "rho": 0.75, "loss": "targeted dlr",
    }  # fmt: skip
    assert parts.parameters("square") == {"queries": 5000, "restarts": 1, "p_init": 0.8}
    l1 = AutoAttackParts(net, norm="l1", eps=12.0, seed=0, num_classes=10, device="cpu")
    assert l1.parameters("apgd-t")["target_classes"] == 5
    assert l1.parameters("apgd-ce")["restarts"] == 5
    before = l1.parameters("apgd-ce")
    pixels, labels = patterns(4, 10)
    with frozen_eval(net):
        l1.perturb("apgd-ce", pixels, labels)
    assert l1.parameters("apgd-ce") == before, "what is reported does not depend on what has run"


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        (2, ["apgd-ce", "fab-t", "square"]),
        (3, ["apgd-ce", "apgd-dlr", "fab-t", "square"]),
        (4, ["apgd-ce", "apgd-t", "fab-t", "square"]),
    ],
)
def test_few_classes_run_what_is_valid(classes, names, few_queries):
    assert standard_parts(classes)[0] == names
    net = robust_net(classes)
    found = ours(net, patterns(20, classes, seed=7), eps="60/255", batch_size=20)
    parameters = found.report.get("robust_accuracy").attack_parameters
    assert [part["name"] for part in parameters["parts"]] == names
    assert [part["target_classes"] for part in parameters["parts"] if part["name"] == "fab-t"] == [classes - 1]
    assert [entry["name"] for entry in parameters["not_run"]] == ([] if classes == 4 else ["apgd-t"])
    assert found.report.get("robust_accuracy").correct < 20


def test_parts_that_too_few_classes_rule_out():
    assert "at least 4 classes" in part_problem("apgd-t", 3)
    assert part_problem("apgd-dlr", 3) is None
    assert part_problem("fab-t", 2) is None


def test_the_global_random_state_is_left_alone():
    net, (pixels, labels) = robust_net(4), patterns(8, 4)
    parts = AutoAttackParts(net, norm="linf", eps=0.1, seed=0, num_classes=4, device="cpu")
    torch.manual_seed(11)
    state = torch.get_rng_state()
    with frozen_eval(net):
        first = parts.perturb("apgd-ce", pixels, labels)
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(3)
        assert torch.equal(parts.perturb("apgd-ce", pixels, labels), first)
    with pytest.raises(ValueError, match="deepfool"):
        parts.perturb("deepfool", pixels, labels)


class Dynamic(torch.nn.Module):
    """Takes a gradient when it classifies, as defences at test time do."""

    def forward(self, pixels):
        with torch.enable_grad():
            x = pixels.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad((x**2).sum(), x)
        return (pixels + gradient).flatten(1)[:, :4]


def test_flags_of_the_model_itself():
    net, (pixels, labels) = robust_net(4), patterns(8, 4)
    clean = model_flags(net, pixels, labels)
    assert clean == {"randomized": [], "probabilities": [], "dynamic": []}
    noisy = LogitsOnly(net, lambda z: z + torch.randn_like(z))
    assert model_flags(noisy, pixels, labels)["randomized"]
    assert model_flags(LogitsOnly(net, lambda z: z.softmax(1)), pixels, labels)["probabilities"]
    tracer = sys.gettrace()
    assert model_flags(Dynamic(), pixels, labels)["dynamic"]
    assert sys.gettrace() is tracer
    assert not model_flags(net, pixels, labels)["dynamic"], "an earlier model's sins are not this one's"


def test_square_flag_is_the_packages():
    assert not square_flag({"clean": 90, "apgd-ce": 50, "square": 50}, 100)
    assert square_flag({"clean": 90, "apgd-ce": 50, "square": 49}, 100)


@pytest.mark.parametrize("part", ["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"])
def test_a_part_gives_the_packages_own_examples(part, few_queries):
    """Under its seed, not under another; whichever part ran before."""
    net, (pixels, labels) = robust_net(4), patterns(8, 4, seed=7)
    norm, eps = ("linf", 0.3) if part == "square" else ("l2", 2.0)
    options = {"norm": norm, "eps": eps, "num_classes": 4, "device": "cpu"}
    parts = AutoAttackParts(net, seed=3, **options)
    suite = AutoAttack(net, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, seed=3, version="standard")
    suite.apgd_targeted.n_target_classes = suite.fab.n_target_classes = 3
    suite.apgd.loss = "dlr" if part == "apgd-dlr" else "ce"
    suite.fab.targeted = part == "fab-t"
    named = {"apgd-ce": suite.apgd, "apgd-dlr": suite.apgd, "apgd-t": suite.apgd_targeted, "fab": suite.fab,
             "fab-t": suite.fab, "square": suite.square}  # fmt: skip
    with frozen_eval(net), torch.random.fork_rng():
        for other in set(named) - {part}:
            parts.parameters(other)
        found = parts.perturb(part, pixels, labels)
        named[part].seed = 3
        with torch.no_grad():
            expected = named[part].perturb(pixels, labels)
        assert torch.equal(found, expected)
        assert (found - pixels).abs().max() > 0.05
        if part in ("apgd-ce", "square"):  # what draws
            again = AutoAttackParts(net, seed=4, **options).perturb(part, pixels, labels)
            assert not torch.equal(found, again)
