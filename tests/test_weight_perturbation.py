import copy

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from tiny import TinyClassifier

from arrest_hub.attacks import pgd
from arrest_hub.baselines import AdversarialTraining
from arrest_hub.step import train_step, worst_case
from arrest_hub.weight_perturbation import WeightPerturbation

GAMMA = 0.01
PIXELS = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(5))
LABELS = torch.arange(6) % 3


def loss_of(net):
    return F.cross_entropy(net(PIXELS.to(net.conv.weight.dtype)).logits, LABELS)


def reference(net):
    """The perturbed weights by the formula, in float64."""
    net = copy.deepcopy(net).double().train()
    weights = {name: weight for name, weight in net.named_parameters() if weight.dim() > 1}
    gradients = torch.autograd.grad(loss_of(net), list(weights.values()))
    return {
        name: weight + GAMMA * weight.norm() * gradient / gradient.norm()
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
    }


@pytest.mark.parametrize("scale", [1.0, 128.0])
def test_weights_move_as_the_formula_says_and_come_back_to_the_last_bit(scale):
    net = TinyClassifier().train()
    before = copy.deepcopy(net.state_dict())
    with WeightPerturbation(net, GAMMA, gradient_scale=scale).worst_case(lambda: loss_of(net)):
        moved = {name: weight.detach().clone() for name, weight in net.named_parameters()}
    wanted = reference(net)
    assert set(wanted) == {"conv.weight", "head.weight"}
    for name, weight in moved.items():
        if name in wanted:
            assert torch.allclose(weight.double(), wanted[name], atol=1e-7)
            assert not torch.equal(weight, before[name])
        else:
            assert torch.equal(weight, before[name]), "biases and normalisation stay"
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} is what it was, BatchNorm's statistics too"
    assert all(parameter.grad is None for parameter in net.parameters()), "and no gradient is left"


def test_the_loss_rises():
    net = TinyClassifier().train()
    before = loss_of(net).item()
    with WeightPerturbation(net, GAMMA).worst_case(lambda: loss_of(net)):
        assert loss_of(net).item() > before + 1e-3


def test_weights_come_back_after_an_error():
    net = TinyClassifier().train()
    before = net.conv.weight.detach().clone()
    perturbation = WeightPerturbation(net, GAMMA)
    with pytest.raises(RuntimeError, match="broken"), perturbation.worst_case(lambda: loss_of(net)):
        raise RuntimeError("broken")
    assert torch.equal(net.conv.weight, before)


def test_weights_come_back_after_an_error_while_they_are_moved(monkeypatch):
    """A full GPU, or Ctrl-C in a notebook."""
    net, plain = TinyClassifier().train(), torch.linalg.vector_norm
    before = copy.deepcopy(net.state_dict())
    perturbation, calls = WeightPerturbation(net, GAMMA), []

    def norm(tensor):
        calls.append(tensor)
        if len(calls) == 4:
            assert not torch.equal(net.conv.weight, before["conv.weight"])
            raise KeyboardInterrupt
        return plain(tensor)

    monkeypatch.setattr(torch.linalg, "vector_norm", norm)
    with pytest.raises(KeyboardInterrupt), perturbation.worst_case(lambda: loss_of(net)):
        pass
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_within_one_autocast_every_pass_has_the_weights_of_its_time():
    """It keeps the weights that it has rounded."""
    net = TinyClassifier().train()
    perturbation, losses = WeightPerturbation(net, 0.5), []

    def loss():
        return F.cross_entropy(net(PIXELS).logits.float(), LABELS)

    def rounded():
        with torch.autocast("cpu", torch.bfloat16):
            return loss().item()

    expected = [rounded()]
    with perturbation.worst_case(loss):
        expected.append(rounded())
    expected.append(rounded())
    with torch.autocast("cpu", torch.bfloat16):
        losses.append(loss().item())
        with perturbation.worst_case(loss):
            losses.append(loss().item())
        losses.append(loss().item())
    assert losses == pytest.approx(expected, rel=2e-2)
    assert losses[1] > losses[0] * 1.2
    assert losses[2] == losses[0]


@pytest.mark.parametrize("factor", [float("nan"), 0.0])
def test_a_gradient_that_is_none_moves_nothing(factor):
    """An fp16 gradient that overflows, or none at all."""
    net = TinyClassifier().train()
    before = net.conv.weight.detach().clone()
    with WeightPerturbation(net, GAMMA).worst_case(lambda: loss_of(net) * factor):
        assert torch.equal(net.conv.weight, before)


def test_a_frozen_head_is_not_perturbed():
    net = TinyClassifier().train()
    net.head.requires_grad_(False)
    before = net.head.weight.clone()
    with WeightPerturbation(net, GAMMA).worst_case(lambda: loss_of(net)):
        assert torch.equal(net.head.weight, before)


def attack(logits_fn, pixels, labels, *, steps, generator=None):
    return pgd(logits_fn, pixels, labels, eps=0.05, step_size=0.02, steps=steps, start=pixels)


def test_a_step_equals_the_loop_written_out():
    """Adversarial examples at the weights, the gradient at the worst weights nearby, the update from the weights."""
    net, lr = TinyClassifier().train(), 0.1
    twin = copy.deepcopy(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    batch = {"pixels": (255 * PIXELS).to(torch.uint8), "label": LABELS}
    objective = AdversarialTraining(attack, attack_steps=2)
    perturbation = WeightPerturbation(net, GAMMA)
    net.passes.clear()
    accelerator = Accelerator(cpu=True)
    train_step(accelerator, net, net, objective, optimizer, batch, torch.Generator(), None, perturbation)
    assert net.passes == [(6, False, True, True)] * 2 + [(6, True, True, False)] * 2

    pixels = batch["pixels"].float() / 255
    twin.eval()
    adversarial = attack(lambda x: twin(x).logits, pixels, LABELS, steps=2).adversarial
    twin.train()
    names = [name for name, weight in twin.named_parameters() if weight.dim() > 1]
    before = {name: weight.detach().clone() for name, weight in twin.named_parameters()}
    statistics = copy.deepcopy([twin.norm.running_mean, twin.norm.running_var, twin.norm.num_batches_tracked])
    gradients = torch.autograd.grad(
        F.cross_entropy(twin(adversarial).logits, LABELS), [dict(twin.named_parameters())[name] for name in names]
    )
    twin.norm.running_mean, twin.norm.running_var, twin.norm.num_batches_tracked = statistics
    with torch.no_grad():
        for name, gradient in zip(names, gradients, strict=True):
            weight = dict(twin.named_parameters())[name]
            weight += GAMMA * weight.norm() * gradient / gradient.norm()
    F.cross_entropy(twin(adversarial).logits, LABELS).backward()
    for name, weight in twin.named_parameters():
        assert torch.allclose(dict(net.named_parameters())[name], before[name] - lr * weight.grad, atol=1e-6)
    assert torch.allclose(net.norm.running_mean, twin.norm.running_mean, atol=1e-6)


def test_without_a_perturbation_nothing_is_computed():
    net = TinyClassifier()
    with worst_case(Accelerator(cpu=True), AdversarialTraining(attack, attack_steps=1), None, None):
        assert not net.passes


class Part(torch.nn.Module):
    """A layer that the loss needs and one that it does not."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = torch.nn.Linear(4, 2), torch.nn.Linear(2, 2)


def test_weights_without_a_gradient_stay():
    net = Part()
    before = copy.deepcopy(net)
    with WeightPerturbation(net, 0.1).worst_case(lambda: net.used(torch.ones(1, 4)).sum()):
        assert torch.equal(net.unused.weight, before.unused.weight)
        assert not torch.equal(net.used.weight, before.used.weight)


def test_what_an_overflowed_gradient_is_of_does_not_move():
    net = Part()
    before = net.used.weight.detach().clone()
    factors = torch.tensor([torch.inf, 1.0, 1.0, 1.0])
    with WeightPerturbation(net, 0.1).worst_case(lambda: (net.used.weight * factors).sum()):
        moved = net.used.weight - before
    assert not moved[:, 0].any()
    assert moved[:, 1:].all()
    assert moved.isfinite().all()


def test_the_gradient_is_scaled_and_averaged():
    net, seen = Part(), []

    def loss():
        value = net.used(torch.ones(1, 4)).sum()
        value.register_hook(lambda gradient: seen.append(gradient.item()))
        return value

    before = net.used.weight.detach().clone()
    perturbation = WeightPerturbation(net, 0.1, gradient_scale=64.0, average=torch.neg)
    with perturbation.worst_case(loss):
        assert (net.used.weight < before).all(), "where the mean over the processes points"
    assert seen == [64.0]
