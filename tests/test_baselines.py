from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tiny import TinyClassifier

from arrest_hub.attacks import pgd
from arrest_hub.backbones import BackboneOutput
from arrest_hub.baselines import AdversarialTraining, StandardObjective, Trades, divergence, divergence_ascent
from arrest_hub.objective import classification_parts

PIXELS = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(5))
LABELS = torch.arange(6) % 3


def test_standard_is_cross_entropy_in_one_pass():
    model = TinyClassifier().train()
    parts = StandardObjective()(model, model, PIXELS, LABELS, torch.Generator())
    wanted = F.cross_entropy(TinyClassifier().train()(PIXELS).logits, LABELS)
    assert parts["loss"].item() == pytest.approx(wanted.item())
    assert model.passes == [(6, True, True, False)]


def test_adversarial_training_trains_on_the_adversarial_images():
    model = TinyClassifier().train()
    objective = AdversarialTraining(partial(pgd, eps=0.05, step_size=0.02, steps=3), attack_steps=3)
    parts = objective(model, model, PIXELS, LABELS, torch.Generator().manual_seed(1))
    assert model.passes == [(6, False, True, True)] * 3 + [(6, True, True, False)]
    other = TinyClassifier().eval()
    x = pgd(
        lambda x: other(x).logits,
        PIXELS,
        LABELS,
        eps=0.05,
        step_size=0.02,
        steps=3,
        generator=torch.Generator().manual_seed(1),
    ).adversarial
    assert parts["loss"].item() == pytest.approx(F.cross_entropy(other.train()(x).logits, LABELS).item(), abs=1e-6)


def test_divergence_equals_the_definition_in_float64():
    p = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).double().softmax(1)
    q = torch.randn(7, 5, generator=torch.Generator().manual_seed(1)).double().softmax(1)
    assert torch.allclose(divergence(p.log().float(), q.log().float()).double(), (p * (p / q).log()).sum(1), atol=1e-6)


@pytest.mark.parametrize("moved", [1e-4, 1e-2, 1.0, 15.0, 60.0, 200.0])
@pytest.mark.parametrize("confidence", [0.1, 1.0, 5.0])
def test_what_trades_attack_ascends_has_the_gradient_of_the_divergence_at_length_1(confidence, moved):
    generator = torch.Generator().manual_seed(0)
    clean = confidence * torch.randn(64, 10, generator=generator)
    logits = clean + moved * torch.randn(64, 10, generator=generator)
    exact = logits.double().requires_grad_(True)
    divergence(clean.double().log_softmax(1), exact.log_softmax(1)).sum().backward()
    expected = exact.grad / exact.grad.abs().sum(1, keepdim=True)
    logits.requires_grad_(True)
    divergence_ascent(logits, clean).sum().backward()
    assert torch.allclose(logits.grad.double(), expected, atol=2e-6)


def test_trades_attack_leaves_its_start_in_half_precision():
    """Where the network is sure, the divergence's own gradient is nothing in fp16."""

    class Rounded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient.half().float()

    class Half(TinyClassifier):
        def forward(self, pixels):
            logits, representation = super().forward(Rounded.apply(pixels))
            return BackboneOutput(160 * logits, representation)

    trades = Trades(beta=6.0, eps=0.1, step_size=0.04, steps=4, norm="linf", gradient_scale=128.0)
    batch = trades.prepare(Half().train(), PIXELS, LABELS, torch.Generator().manual_seed(0))
    assert not batch.parts["zero_gradient_share"].any()
    moved = (batch.inputs[len(PIXELS) :] - PIXELS).abs().amax(dim=(1, 2, 3))
    assert torch.allclose(moved, torch.full_like(moved, 0.1), atol=1e-6)


def test_divergence_ascent_is_flat_where_nothing_has_moved():
    logits = torch.randn(64, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    divergence_ascent(logits, logits.detach().clone()).sum().backward()
    assert not logits.grad.any()


def test_divergence_ascent_stays_finite_however_far_the_logits_have_moved():
    logits = (1e4 * torch.randn(64, 4, generator=torch.Generator().manual_seed(0))).requires_grad_(True)
    divergence_ascent(logits, torch.randn(64, 4, generator=torch.Generator().manual_seed(1))).sum().backward()
    assert torch.allclose(logits.grad.abs().sum(1), torch.ones(64))


def test_trades_equals_the_formula_written_out():
    eps, step, steps, beta = 0.3, 0.1, 4, 6.0
    model = TinyClassifier().train()
    parts = Trades(beta=beta, eps=eps, step_size=step, steps=steps, norm="linf")(
        model, model, PIXELS, LABELS, torch.Generator().manual_seed(4)
    )
    assert model.passes == [(6, False, False, True)] + [(6, False, True, True)] * steps + [(12, True, True, False)]

    # in float64: near the clean image the divergence and its gradient are tiny
    other, pixels = TinyClassifier().eval().double(), PIXELS.double()
    p = other(pixels).logits.softmax(1).detach()
    x = (PIXELS + 0.001 * torch.randn(PIXELS.shape, generator=torch.Generator().manual_seed(4))).clamp(0, 1).double()
    for _ in range(steps):
        x.requires_grad_(True)
        q = other(x).logits.softmax(1)
        (g,) = torch.autograd.grad((p * (p / q).log()).sum(), x)
        x = torch.minimum(torch.maximum(x.detach() + step * g.sign(), pixels - eps), pixels + eps).clamp(0, 1)
    clean, robust = other.train()(torch.cat([pixels, x])).logits.chunk(2)
    p, q = clean.softmax(1), robust.softmax(1)
    wanted = F.cross_entropy(clean, LABELS) + beta * (p * (p / q).log()).sum(1).mean()
    assert parts["loss"].item() == pytest.approx(wanted.item(), rel=2e-4)


def test_label_smoothing_in_the_baselines():
    """Of the cross-entropy alone: TRADES' divergence is not of labels."""
    targets = 0.9 * F.one_hot(LABELS, 3) + 0.1 / 3

    def smoothed(logits):
        return -(targets * logits.log_softmax(1)).sum(1).mean().item()

    def attack(logits_fn, pixels, labels, *, steps, generator=None):
        return pgd(logits_fn, pixels, labels, eps=0.05, step_size=0.02, steps=steps, start=pixels)

    model = TinyClassifier().train()
    batch = AdversarialTraining(attack, attack_steps=2).prepare(model, PIXELS, LABELS, torch.Generator())
    parts = AdversarialTraining(attack, attack_steps=2, label_smoothing=0.1).loss(TinyClassifier().train(), batch)
    assert parts["loss"].item() == pytest.approx(smoothed(TinyClassifier().train()(batch.inputs).logits), abs=1e-6)

    values = {"beta": 6.0, "eps": 0.05, "step_size": 0.02, "steps": 2, "norm": "linf"}
    batch = Trades(**values).prepare(model, PIXELS, LABELS, torch.Generator().manual_seed(0))
    plain = Trades(**values).loss(TinyClassifier().train(), batch)
    parts = Trades(**values, label_smoothing=0.1).loss(TinyClassifier().train(), batch)
    clean = TinyClassifier().train()(batch.inputs).logits[:6]
    difference = smoothed(clean) - F.cross_entropy(clean, LABELS).item()
    assert parts["loss"].item() - plain["loss"].item() == pytest.approx(difference, abs=1e-5)


def test_trades_counts_clean_and_adversarial_images_apart():
    trades = Trades(beta=6.0, eps=0.3, step_size=0.1, steps=4, norm="linf")
    batch = trades.prepare(TinyClassifier().train(), PIXELS, LABELS, torch.Generator().manual_seed(0))
    halves = TinyClassifier().train()(batch.inputs).logits.chunk(2)
    parts = trades.loss(TinyClassifier().train(), batch)
    for name, logits in zip(("clean_correct", "adversarial_correct"), halves, strict=True):
        assert torch.equal(parts[name], (logits.argmax(1) == LABELS).float())
    assert not torch.equal(parts["clean_correct"], parts["adversarial_correct"])


def test_trades_attack_is_scaled_in_fp16_and_attacks_in_parts():
    seen, sizes = [], []

    class Net(TinyClassifier):
        def forward(self, images):
            sizes.append(len(images))
            output = super().forward(images)
            if output.logits.requires_grad:
                output.logits.register_hook(lambda gradient: seen.append(gradient.abs().sum(1)))
            return output

    trades = Trades(beta=6.0, eps=0.1, step_size=0.04, steps=1, norm="linf", gradient_scale=128.0, images_at_once=2)
    trades.prepare(Net(), PIXELS, LABELS, torch.Generator().manual_seed(0))
    assert torch.cat(seen).allclose(torch.full((6,), 128.0))
    assert sizes == [6, 2, 2, 2], "the clean images in one pass"


def test_cross_entropy_of_half_precision_logits_is_float32():
    parts = classification_parts(torch.randn(4, 3).half(), torch.tensor([0, 1, 2, 0]), "clean_correct")
    assert parts["cross_entropy"].dtype == torch.float32
