import math

import eagerpy
import foolbox
import pytest
import torch
import torch.nn.functional as F
from tiny import LogitsOnly, TinyClassifier, pretrained_state, tiny_backbone

from arrest_hub.attack_schedule import attack_steps_at, default_step_size
from arrest_hub.attacks import frozen_eval, margin, pgd, project, random_in_ball


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(16, 3, 8, 8, generator=generator), torch.arange(16) % 3


def reference_pgd(model, pixels, labels, start, eps, step_size, steps, norm):
    """PGD on cross-entropy in float64, one sample at a time, written out from Madry et al. 2018."""
    adversarial = []
    for x, y, x0 in zip(pixels.double(), labels, start.double(), strict=True):
        x_adv = x0.clone()
        for _ in range(steps):
            x_adv.requires_grad_(True)
            loss = F.cross_entropy(model(x_adv[None]).logits, y[None])
            (g,) = torch.autograd.grad(loss, x_adv)
            with torch.no_grad():
                if norm == "linf":
                    x_adv = x_adv + step_size * g.sign()
                    x_adv = torch.minimum(torch.maximum(x_adv, x - eps), x + eps)
                else:
                    x_adv = x_adv + step_size * g / g.norm()
                    delta = x_adv - x
                    x_adv = x + delta * min(1.0, eps / delta.norm().item())
                x_adv = x_adv.clamp(0, 1)
        adversarial.append(x_adv.detach())
    return torch.stack(adversarial)


@pytest.mark.parametrize(("norm", "eps", "step"), [("linf", 8 / 255, 2 / 255), ("l2", 0.5, 0.15)])
def test_pgd_equals_cross_entropy_pgd_in_float64(batch, norm, eps, step):
    pixels, labels = batch
    model = TinyClassifier().double()
    start = random_in_ball(pixels, eps=eps, norm=norm, generator=torch.Generator().manual_seed(2)).double()
    with frozen_eval(model):
        found = pgd(
            lambda x: model(x).logits, pixels.double(), labels, eps=eps, step_size=step, steps=5, norm=norm, start=start
        )
        wanted = reference_pgd(model, pixels, labels, start, eps, step, 5, norm)
    # the margin is summed in fp32, so a gradient entry within rounding of zero may change its sign
    agree = ((found.adversarial - wanted).abs() < 1e-5).float().mean()
    assert agree > 0.999
    assert found.zero_gradients.sum() == 0


@pytest.mark.parametrize(("norm", "eps", "step"), [("linf", 8 / 255, 2 / 255), ("l2", 0.5, 0.2)])
def test_pgd_stays_in_the_ball_and_raises_the_loss(batch, norm, eps, step):
    pixels, labels = batch
    before = pixels.clone()
    model = TinyClassifier()
    with frozen_eval(model):
        adversarial = pgd(
            lambda x: model(x).logits, pixels, labels, eps=eps, step_size=step, steps=10, norm=norm
        ).adversarial
        clean_loss = F.cross_entropy(model(pixels).logits, labels, reduction="none")
        adversarial_loss = F.cross_entropy(model(adversarial).logits, labels, reduction="none")
    delta = (adversarial - pixels).flatten(1)
    size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert (size <= eps + 1e-6).all()
    assert (size > 0.5 * eps).all()
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert (adversarial_loss > clean_loss).all()
    assert torch.equal(pixels, before), "the clean batch must not change"
    assert not adversarial.requires_grad


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_parts_of_a_batch_give_what_the_batch_gives(batch, norm):
    pixels, labels = batch
    model, sizes = TinyClassifier().double(), []

    def logits(x):
        sizes.append(len(x))
        return model(x).logits

    numbers = {"eps": 0.1, "step_size": 0.05, "steps": 3, "norm": norm}
    with frozen_eval(model):
        whole, parts = (
            pgd(logits, pixels.double(), labels, generator=torch.Generator().manual_seed(2), images_at_once=count,
                **numbers)
            for count in (None, 7)
        )  # fmt: skip
    assert sizes == [16] * 3 + [6] * 3 + [5] * 6  # sixteen in three equal parts
    torch.testing.assert_close(parts.adversarial, whole.adversarial)
    assert torch.equal(parts.zero_gradients, whole.zero_gradients)


def reference_stopped_pgd(model, pixels, labels, start, eps, step_size, steps, stop_after):
    """(where one sample at a time ends, in how many steps): as soon as a forward pass misclassifies a sample it takes
    ``stop_after`` steps more, that pass's own among them."""
    ends, counts = [], []
    for x, y, end in zip(pixels, labels, start, strict=True):
        may, count = steps, 0
        for _ in range(steps):
            if may == 0:
                break
            end.requires_grad_(True)
            logits = model(end[None]).logits
            (g,) = torch.autograd.grad(F.cross_entropy(logits, y[None]), end)
            count += 1
            if logits.argmax() != y:
                may = min(may, stop_after)
            end = end.detach()
            if may == 0:
                break
            end = torch.minimum(torch.maximum(end + step_size * g.sign(), x - eps), x + eps).clamp(0, 1)
            may -= 1
        ends.append(end)
        counts.append(count)
    return torch.stack(ends), counts


@pytest.mark.parametrize("stop_after", [0, 1, 2])
def test_a_sample_is_left_alone_once_it_is_misclassified(batch, stop_after):
    pixels, labels = batch[0].double(), batch[1]
    model, sizes = TinyClassifier(num_classes=3).double(), []
    with torch.no_grad():
        right = model(pixels).logits.argmax(1)
        labels = torch.where(torch.arange(16) < 12, right, labels)

    def logits(x):
        sizes.append(len(x))
        return model(x).logits

    numbers = {"eps": 0.3, "step_size": 0.03, "steps": 10}
    with frozen_eval(model):
        wanted, counts = reference_stopped_pgd(model, pixels, labels, pixels.clone(), *numbers.values(), stop_after)
        numbers |= {"start": pixels, "stop_after": stop_after}
        found = pgd(logits, pixels, labels, **numbers)
        assert found.steps.tolist() == counts
        assert len(set(counts)) > 2, "some stop early, some late"
        assert sizes == [sum(count > step for count in counts) for step in range(max(counts))]
        # an entry of the gradient within rounding of zero may change its sign
        assert ((found.adversarial - wanted).abs() < 1e-6).double().mean() > 0.999
        sizes.clear()
        whole = pgd(logits, pixels, labels, **numbers, static_shapes=True)
        assert sizes == [16] * 10
        assert whole.steps.tolist() == [10] * 16
        torch.testing.assert_close(whole.adversarial, found.adversarial)
        parts = pgd(logits, pixels, labels, **numbers, images_at_once=5)
        torch.testing.assert_close(parts.adversarial, found.adversarial)
        assert parts.steps.tolist() == counts
        # as good as never: each is attacked to the end
        numbers["stop_after"] = 10
        torch.testing.assert_close(
            pgd(logits, pixels, labels, **numbers).adversarial,
            pgd(logits, pixels, labels, **(numbers | {"stop_after": None})).adversarial,
        )


def test_the_default_step_reaches_the_border_from_anywhere(batch):
    pixels, labels = batch
    model = TinyClassifier()
    with frozen_eval(model):
        found, wanted = (
            pgd(lambda x: model(x).logits, pixels, labels, eps=0.1, step_size=size, steps=5, start=pixels).adversarial
            for size in (None, 0.05)
        )
    assert torch.equal(found, wanted)


def test_attack_steps_grow_evenly():
    steps = [attack_steps_at(step / 90, 2, 10) for step in range(90)]
    assert steps == [count for count in range(2, 11) for _ in range(10)]
    assert attack_steps_at(1.0, 2, 10) == 10
    assert {attack_steps_at(step / 7, 5, 5) for step in range(8)} == {5}


def test_pgd_equals_torchattacks_in_direction(batch):
    # torchattacks' own loss is the mean cross-entropy; from the same start the signs, so the results, are the same
    pixels, labels = batch
    model = TinyClassifier()
    start = random_in_ball(pixels, eps=0.03, norm="linf", generator=torch.Generator().manual_seed(3))
    with frozen_eval(model):
        ours = pgd(
            lambda x: model(x).logits, pixels, labels, eps=0.03, step_size=0.01, steps=1, start=start
        ).adversarial
        x = start.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x).logits, labels), x)
    theirs = torch.clamp(torch.clamp(start + 0.01 * gradient.sign(), pixels - 0.03, pixels + 0.03), 0, 1)
    assert torch.allclose(ours, theirs, atol=1e-7)


def test_margin_has_cross_entropys_direction_and_no_underflow():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 10, generator=generator, dtype=torch.float64) * 5
    labels = torch.arange(50) % 10
    a = logits.clone().requires_grad_(True)
    b = logits.clone().requires_grad_(True)
    (ga,) = torch.autograd.grad(margin(a, labels).sum(), a)
    (gb,) = torch.autograd.grad(F.cross_entropy(b, labels, reduction="sum"), b)
    assert torch.allclose(F.normalize(ga, dim=1), F.normalize(gb, dim=1), atol=1e-5)
    # softplus(margin) is cross-entropy
    assert torch.allclose(
        F.softplus(margin(logits, labels).double()), F.cross_entropy(logits, labels, reduction="none"), atol=1e-4
    )

    confident = torch.zeros(1, 10).index_fill(1, torch.tensor([0]), 200.0).requires_grad_(True)
    (plain,) = torch.autograd.grad(F.cross_entropy(confident, torch.tensor([0])), confident)
    (ours,) = torch.autograd.grad(margin(confident, torch.tensor([0])).sum(), confident)
    assert plain.abs().sum() == 0, "the premise: cross-entropy's own gradient underflows here"
    assert torch.allclose(ours[0, 0], torch.tensor(-1.0))


def test_margin_with_two_classes():
    logits = torch.tensor([[1.0, 3.0], [2.0, -1.0]])
    assert torch.allclose(margin(logits, torch.tensor([0, 0])), torch.tensor([2.0, -3.0]))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_in_ball_is_uniform(norm):
    pixels = torch.full((20000, 1, 2, 2), 0.5)
    eps = 0.1
    noise = random_in_ball(pixels, eps=eps, norm=norm, generator=torch.Generator().manual_seed(0)) - pixels
    flat = noise.flatten(1)
    if norm == "linf":
        assert flat.abs().max() <= eps + 1e-6
        assert flat.mean().abs() < 1e-3
        assert math.isclose(flat.std().item(), eps / math.sqrt(3), rel_tol=0.01)
    else:
        radius = flat.norm(dim=1)
        assert radius.max() <= eps + 1e-6
        # uniform in a 4-ball: P(r < eps/2) = 1/16
        assert math.isclose((radius < eps / 2).float().mean().item(), 1 / 16, rel_tol=0.1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", [(32, 3), (3, 8, 8), (2, 3, 4, 8, 8)])
def test_random_in_ball_of_any_shape(norm, shape):
    for eps in (0.1, torch.full(shape[:1], 0.1)):
        noise = random_in_ball(torch.full(shape, 0.5), eps=eps, norm=norm) - 0.5
        assert noise.shape == shape
        size = noise.flatten(1).abs().amax(1) if norm == "linf" else noise.flatten(1).norm(dim=1)
        assert (size <= 0.1 + 1e-6).all()
        assert (size > 0).all()


def test_random_in_ball_clips_to_pixels_and_repeats():
    pixels = torch.zeros(4, 3, 8, 8)
    first = random_in_ball(pixels, eps=0.5, norm="linf", generator=torch.Generator().manual_seed(7))
    again = random_in_ball(pixels, eps=0.5, norm="linf", generator=torch.Generator().manual_seed(7))
    assert torch.equal(first, again)
    assert first.min() >= 0


def test_project_onto_l2_is_the_nearest_point():
    pixels = torch.full((1, 1, 1, 2), 0.5)
    outside = pixels + torch.tensor([[[[0.3, 0.4]]]])
    assert torch.allclose(project(outside, pixels, eps=0.25, norm="l2"), pixels + torch.tensor([[[[0.15, 0.2]]]]))


@pytest.mark.parametrize("function", [project, random_in_ball])
def test_unknown_norm(function):
    arguments = (torch.zeros(1, 1, 2, 2),) * (2 if function is project else 1)
    with pytest.raises(ValueError, match="l7"):
        function(*arguments, eps=0.1, norm="l7")


def test_the_attack_costs_no_parameter_gradient_and_leaves_the_model_as_it_was(batch):
    pixels, labels = batch
    model = TinyClassifier().train()
    model.head.bias.requires_grad_(False)
    statistics = model.norm.running_mean.clone()
    with frozen_eval(model):
        pgd(lambda x: model(x).logits, pixels, labels, eps=0.03, step_size=0.01, steps=4)
    assert [count for count, *_ in model.passes] == [16] * 4, "one forward pass a step"
    assert all(not training and frozen for _, training, _, frozen in model.passes)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(model.norm.running_mean, statistics)
    assert model.training
    assert model.conv.weight.requires_grad
    assert not model.head.bias.requires_grad, "a frozen parameter stays frozen"


def test_frozen_eval_restores_after_an_error():
    model = TinyClassifier().train()
    with pytest.raises(RuntimeError, match="inside"), frozen_eval(model):
        raise RuntimeError("inside")
    assert model.training
    assert model.conv.weight.requires_grad


def test_zero_gradients_are_counted(batch):
    pixels, labels = batch

    def masked(x):
        return torch.cat([TinyClassifier()(x[:10]).logits, x[10:].flatten(1)[:, :3] * 0])

    result = pgd(masked, pixels, labels, eps=0.03, step_size=0.01, steps=3)
    assert result.zero_gradients.tolist() == [0.0] * 10 + [3.0] * 6


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_gradient_that_is_nan_counts_as_none(batch, norm):
    """The logits are finite: nothing else would tell that the attack does not move."""
    pixels, labels = batch

    def undefined(x):
        spread = (x - x).flatten(1).pow(2).sum(dim=1, keepdim=True).sqrt()  # 0, of gradient NaN
        return TinyClassifier()(x).logits + spread

    result = pgd(undefined, pixels, labels, eps=0.03, step_size=0.01, steps=3, norm=norm, start=pixels)
    assert result.zero_gradients.tolist() == [3.0] * 16
    assert torch.equal(result.adversarial, pixels)


def test_no_gradient_is_no_step_where_small_numbers_are_flushed(batch):
    pixels, labels = batch
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush")
    try:
        found = pgd(
            lambda x: x.flatten(1)[:, :3] * 0, pixels, labels, eps=0.5, step_size=0.1, steps=2, norm="l2", start=pixels
        )
    finally:
        torch.set_flush_denormal(False)
    torch.testing.assert_close(found.adversarial, pixels, rtol=0, atol=1e-7)


@pytest.mark.parametrize("scale", [1e-36, 1e-30, 1e20, 1e30])
def test_l2_steps_are_as_long_whatever_the_gradients_size(batch, scale):
    """Their squares are no numbers of single precision."""
    pixels, labels = batch
    weight = torch.randn(3 * 8 * 8, 3, generator=torch.Generator().manual_seed(1))

    def attacked(factor):
        return pgd(
            lambda x: x.flatten(1) @ weight, pixels, labels, eps=1.0, step_size=0.1, steps=1, norm="l2", start=pixels,
            loss_fn=lambda logits, targets: logits.gather(1, targets[:, None])[:, 0] * factor,
        ).adversarial  # fmt: skip

    torch.testing.assert_close(attacked(scale), attacked(1.0), rtol=0, atol=1e-6)


def test_half_precision_attack_agrees_with_fp32_on_a_confident_model(batch):
    pixels, labels = batch
    model = TinyClassifier().eval()
    with torch.no_grad():
        labels = model(pixels).logits.argmax(1)  # always right, and after the scaling very sure
        model.head.weight *= 300
        model.head.bias *= 300
        assert F.cross_entropy(model(pixels).logits, labels, reduction="none").median() < 1e-3

    def half(x):
        with torch.autocast("cpu", dtype=torch.float16):
            return model(x).logits

    kwargs = {"eps": 0.1, "step_size": 0.01, "steps": 1, "start": pixels}
    with frozen_eval(model):
        exact = pgd(lambda x: model(x).logits, pixels, labels, **kwargs).adversarial - pixels
        ours = pgd(half, pixels, labels, **kwargs, gradient_scale=128.0)
    assert ours.zero_gradients.sum() == 0
    inside = (pixels > 0.02) & (pixels < 0.98)
    agree = ((ours.adversarial - pixels).sign() == exact.sign())[inside].float().mean()
    assert agree >= 0.99


@pytest.mark.parametrize(("norm", "eps"), [("linf", 32 / 255), ("l2", 0.75)])
def test_pgd_equals_foolbox(norm, eps):
    """Loss and verdicts of an independent implementation, from the same start, on a trained network."""
    model = tiny_backbone()
    model.load_state_dict(pretrained_state(3))
    labels = torch.arange(96) % 3
    noise = torch.randn(96, 3, 8, 8, generator=torch.Generator().manual_seed(3)) * 25
    pixels = ((60 + 70 * labels.view(-1, 1, 1, 1) + noise) / 255).clamp(0, 1)
    start = random_in_ball(pixels, eps=eps, norm=norm, generator=torch.Generator().manual_seed(4))
    theirs = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}[norm](abs_stepsize=eps / 4, steps=20)
    theirs.get_random_start = lambda x0, epsilon: eagerpy.astensor(start)
    with frozen_eval(model):
        network = foolbox.PyTorchModel(LogitsOnly(model).eval(), bounds=(0, 1), device="cpu")
        wanted = theirs.run(network, pixels, labels, epsilon=eps)
        found = pgd(
            lambda x: model(x).logits, pixels, labels, eps=eps, step_size=eps / 4, steps=20, norm=norm, start=start
        ).adversarial
        with torch.no_grad():
            logits = [model(x).logits for x in (wanted, found)]
    verdicts = [(z.argmax(1) != labels) for z in logits]
    assert torch.equal(*verdicts)
    assert 10 < verdicts[0].sum() < 90
    losses = [F.cross_entropy(z, labels, reduction="none") for z in logits]
    # a gradient within rounding of zero may go either way, so a few images end elsewhere in the ball
    close = torch.isclose(losses[0], losses[1], rtol=1e-3, atol=1e-4)
    assert close.float().mean() >= 0.95
    assert losses[1].mean() == pytest.approx(losses[0].mean().item(), rel=1e-2)


def test_frozen_eval_restores_each_modules_mode(batch):
    """Frozen BatchNorm, as in finetuning of few images; and a network that is evaluated with one part in training."""
    pixels, labels = batch
    model = TinyClassifier().train()
    model.norm.eval()
    statistics = model.norm.running_mean.clone()
    with frozen_eval(model):
        assert not any(module.training for module in model.modules())
        pgd(lambda x: model(x).logits, pixels, labels, eps=0.03, step_size=0.01, steps=1)
    assert [module.training for module in model.modules() if module is model.norm] == [False]
    assert model.training
    assert model.conv.training
    model(pixels)
    assert torch.equal(model.norm.running_mean, statistics)

    model.eval()
    model.norm.train()
    with frozen_eval(model):
        assert not model.norm.training
    assert model.norm.training
    assert not model.training


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pure_half_precision_no_steps_and_no_images(norm):
    pixels = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model = TinyClassifier().eval().bfloat16()
    labels = torch.zeros(4, dtype=torch.long)
    eps = {"linf": 8 / 255, "l2": 0.5}[norm]
    found = pgd(lambda x: model(x).logits, pixels.bfloat16(), labels, eps=eps, step_size=None, steps=2, norm=norm)
    assert found.adversarial.dtype == torch.bfloat16
    assert random_in_ball(pixels.half(), eps=eps, norm=norm).dtype == torch.float16
    start = pixels * 0.5
    found = pgd(lambda x: x, pixels, labels, eps=eps, step_size=None, steps=0, norm=norm, start=start)
    assert torch.equal(found.adversarial, start)
    assert random_in_ball(pixels[:0], eps=eps, norm=norm).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_half_precision_l2_steps_are_as_long_as_others(scale):
    """The norm of the gradient overflows there, and of no gradient at all it is zero."""
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1])
    weight = torch.randn(2, 3 * 16 * 16, generator=torch.Generator().manual_seed(1))

    def attacked(x):
        def logits(z):
            return scale * (z.flatten(1) @ weight.to(z.dtype).T).float() / 100

        return pgd(logits, x, labels, eps=0.5, step_size=0.25, steps=2, norm="l2", start=x).adversarial

    half, whole = attacked(pixels.half()).float(), attacked(pixels)
    torch.testing.assert_close(half, whole, rtol=0, atol=2e-3)
    moved = (half - pixels.half().float()).flatten(1).norm(dim=1)
    assert moved.tolist() == pytest.approx([0.0 if scale == 0 else 0.5] * 2, abs=0.02)


def test_steps_after_the_last_are_no_zero_gradients():
    """An image that is attacked no more has none, whether its batch keeps its size or not."""
    pixels = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def logits_of(images):  # always class 0, without a gradient
        nothing = 0 * images.flatten(1).sum(1)
        return torch.stack([nothing + 1, nothing], 1)

    for static_shapes in (False, True):
        found = pgd(
            logits_of, pixels, torch.tensor([1, 1, 0, 0]), eps=0.1, step_size=None, steps=5, start=pixels,
            stop_after=1, static_shapes=static_shapes,
        )  # fmt: skip
        assert found.zero_gradients.tolist() == [1, 1, 5, 5]


def test_a_single_step_may_leave_the_ball_and_is_projected():
    assert default_step_size(0.1, 1) == pytest.approx(0.25)
