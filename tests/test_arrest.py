import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tiny import TinyClassifier

from arrest_hub.arrest import ArrestObjective, angular_distance
from arrest_hub.attacks import AttackResult, pgd, random_in_ball
from arrest_hub.baselines import AdversarialTraining, Trades

EPS, STEP, STEPS = 0.05, 0.02, 3


def reference_distance(u, v):
    u, v = u.double(), v.double()
    cosine = (u * v).sum(1) / (u.norm(dim=1) * v.norm(dim=1))
    return torch.arccos(cosine.clamp(-1, 1)) / math.pi


def test_angular_distance_equals_float64_arccos():
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(2000, 64, generator=generator)
    for share in (0.0, 0.5, 0.9, 1.1, -1.0, -3.0):
        v = torch.randn(2000, 64, generator=generator) + share * u
        assert (angular_distance(u, v).double() - reference_distance(u, v)).abs().max() < 1e-6


def test_angular_distance_of_known_angles():
    u = torch.tensor([[1.0, 0.0]]).expand(5, 2)
    angles = torch.tensor([0.0, 1e-6, math.pi / 4, math.pi / 2, math.pi], dtype=torch.float64)
    v = torch.stack([angles.cos(), angles.sin()], dim=1).float()
    assert torch.allclose(angular_distance(u, v).double(), angles / math.pi, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_gradient_is_finite_where_arccos_has_none(sign):
    u = torch.randn(4, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    angular_distance(u, sign * u.detach()).sum().backward()
    assert torch.isfinite(u.grad).all()
    near = (sign * u.detach() * (1 + 1e-7)).requires_grad_(True)
    angular_distance(near, u.detach()).sum().backward()
    assert torch.isfinite(near.grad).all()


def test_gradient_equals_float64():
    generator = torch.Generator().manual_seed(3)
    u, v = torch.randn(8, 16, generator=generator), torch.randn(8, 16, generator=generator)
    a, b = u.clone().requires_grad_(True), u.double().requires_grad_(True)
    angular_distance(a, v).sum().backward()
    reference_distance(b, v).sum().backward()
    assert torch.allclose(a.grad.double(), b.grad, atol=1e-6)


def test_zero_representation_is_at_a_right_angle_and_finite():
    u = torch.zeros(1, 4, requires_grad=True)
    distance = angular_distance(u, torch.ones(1, 4))
    distance.sum().backward()
    assert distance.item() == pytest.approx(0.5)
    assert torch.isfinite(u.grad).all()


def test_fp32_under_autocast():
    u = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    v = u + 1e-3 * torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert angular_distance(u, v).dtype == torch.float32
        assert torch.equal(angular_distance(u, v), angular_distance(u.clone(), v))
    assert torch.allclose(angular_distance(u, v).double(), reference_distance(u, v), atol=1e-6)


@pytest.fixture
def setting():
    pixels = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    labels = torch.arange(12) % 3
    student, teacher = TinyClassifier(seed=0), TinyClassifier(seed=1).eval().requires_grad_(False)
    return student, teacher, pixels, labels


def make(teacher, **changes):
    values = {"rgkd_weight": 10.0, "replay_threshold": 0.25, "attack_steps": STEPS} | changes
    return ArrestObjective(
        teacher,
        partial(pgd, eps=EPS, step_size=STEP, steps=STEPS, norm="linf"),
        partial(random_in_ball, eps=EPS, norm="linf"),
        **values,
    )


def drift_of(student, teacher, pixels):
    student.eval()
    with torch.no_grad():
        return reference_distance(student(pixels).representation, teacher(pixels).representation)


def test_loss_equals_the_formula_written_out(setting):
    student, teacher, pixels, labels = setting
    drift = drift_of(student, teacher, pixels)
    tau = drift.median().item()
    replayed = drift > tau
    assert 0 < replayed.sum() < 12

    # the draws in the order the method needs them: noise for all, then the start of those attacked
    generator = torch.Generator().manual_seed(9)
    noisy = (pixels + (torch.rand(pixels.shape, generator=generator) * 2 - 1) * EPS).clamp(0, 1)
    attacked = ~replayed
    x = (pixels[attacked] + (torch.rand(pixels[attacked].shape, generator=generator) * 2 - 1) * EPS).clamp(0, 1)
    student.eval()
    for _ in range(STEPS):
        x.requires_grad_(True)
        (g,) = torch.autograd.grad(F.cross_entropy(student(x).logits, labels[attacked], reduction="sum"), x)
        x = torch.minimum(torch.maximum(x.detach() + STEP * g.sign(), pixels[attacked] - EPS), pixels[attacked] + EPS)
        x = x.clamp(0, 1)
    inputs = noisy.clone()
    inputs[attacked] = x
    student.train()
    output = student(inputs)
    wanted = F.cross_entropy(output.logits, labels).double()
    wanted = wanted + 10.0 * reference_distance(output.representation, teacher(pixels).representation).mean()

    again = TinyClassifier(seed=0).train()
    parts = make(teacher, replay_threshold=tau)(again, again, pixels, labels, torch.Generator().manual_seed(9))
    assert parts["loss"].item() == pytest.approx(wanted.item(), abs=1e-5)
    assert torch.equal(parts["replayed"].bool(), replayed)
    assert torch.allclose(parts["drift"].double(), drift, atol=1e-6)


def test_passes_are_what_they_must_be(setting):
    """K attack passes with input gradients only, one training pass, one teacher pass, one drift pass, nothing more."""
    student, teacher, pixels, labels = setting
    student.train()
    tau = drift_of(student, teacher, pixels).median().item()
    student.train()
    student.passes.clear()
    teacher.passes.clear()
    backwards = []
    student.conv.weight.register_hook(lambda g: backwards.append("parameters"))
    objective = make(teacher, replay_threshold=tau)
    parts = objective(student, student, pixels, labels, torch.Generator().manual_seed(0))
    parts["loss"].backward()

    attacked = int((parts["replayed"] == 0).sum())
    assert 0 < attacked < 12, "replayed samples are left out of the attack"
    drift = (12, False, False, True)  # images, training mode, gradients, parameters frozen
    attack = (attacked, False, True, True)
    training = (12, True, True, False)
    assert student.passes == [drift] + [attack] * STEPS + [training]
    assert teacher.passes == [(12, False, False, True)]
    assert backwards == ["parameters"], "one backward pass to the parameters"
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert objective.passes == {"attack": STEPS, "training": 1, "teacher": 1, "drift": 1}


def test_parts_switched_off_cost_nothing(setting):
    student, teacher, pixels, labels = setting
    student.train()
    objective = make(teacher, replay_threshold=None)
    objective(student, student, pixels, labels, torch.Generator().manual_seed(0))
    assert len(student.passes) == STEPS + 1
    assert len(teacher.passes) == 1
    assert objective.passes == {"attack": STEPS, "training": 1, "teacher": 1}

    student.passes.clear()
    plain = make(None, replay_threshold=None, rgkd_weight=0.0)
    parts = plain(student, student, pixels, labels, torch.Generator().manual_seed(0))
    assert len(student.passes) == STEPS + 1
    assert plain.passes == {"attack": STEPS, "training": 1}
    assert "distance" not in parts
    assert parts["loss"].item() == pytest.approx(parts["cross_entropy"].mean().item())


def test_a_batch_that_is_replayed_whole_is_not_attacked(setting):
    student, teacher, pixels, labels = setting
    student.train()
    parts = make(teacher, replay_threshold=0.0)(student, student, pixels, labels, torch.Generator().manual_seed(0))
    assert parts["replayed"].sum() == 12
    assert len(student.passes) == 2, "drift and training"
    assert torch.isfinite(parts["loss"])


def test_at_initialisation_nothing_has_drifted(setting):
    student, _, pixels, labels = setting
    teacher = TinyClassifier(seed=0).eval().requires_grad_(False)
    parts = make(teacher)(student, student, pixels, labels, torch.Generator().manual_seed(0))
    assert parts["drift"].max() == 0
    assert parts["replayed"].sum() == 0
    parts["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters())


def test_a_missing_teacher_is_an_error():
    with pytest.raises(ValueError, match="teacher"):
        make(None)


def test_static_shapes_give_the_same():
    """What is replayed is attacked in vain, and the images that are trained on are the same."""
    teacher, student = TinyClassifier(seed=1).eval(), TinyClassifier().eval()
    pixels, labels = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
    found = []
    for static in (False, True):
        batches = []

        def attack(logits_fn, x, y, *, steps, generator=None, batches=batches):
            batches.append(len(x))
            return pgd(logits_fn, x, y, eps=0.03, step_size=0.02, steps=steps, start=x)

        objective = ArrestObjective(
            teacher, attack, lambda x, *, generator=None: (x + 0.01).clamp(0, 1), rgkd_weight=1.0,
            replay_threshold=0.3, attack_steps=2, static_shapes=static,
        )  # fmt: skip
        with torch.no_grad():
            drift = objective(student, student, pixels, labels, torch.Generator())["drift"]
        objective.replay_threshold = float(drift.median())
        batches.clear()
        parts = objective(student, student, pixels, labels, torch.Generator())
        assert batches == [8 if static else int((drift <= drift.median()).sum())]
        found.append(parts)
        objective.replay_threshold = -1.0  # nothing is left to attack
        batches.clear()
        objective(student, student, pixels, labels, torch.Generator())
        assert batches == ([8] if static else [])
    assert found[0].keys() == found[1].keys()
    assert torch.equal(found[0].pop("attack_steps"), 2 * (1 - found[0]["replayed"]))
    assert found[1].pop("attack_steps").tolist() == [2.0] * 8
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, msg=name)


def test_the_share_of_attack_steps_without_a_gradient():
    def attack(logits_fn, x, y, *, steps, generator=None):
        return AttackResult(x, torch.tensor([0.0, 1.0, 4.0]), torch.tensor([0.0, 4.0, 4.0]))

    net, batch = TinyClassifier(), (torch.rand(3, 3, 8, 8), torch.arange(3))
    ours = ArrestObjective(None, attack, None, rgkd_weight=0.0, replay_threshold=None, attack_steps=4)
    for objective in (ours, AdversarialTraining(attack, attack_steps=4)):
        parts = objective(net, net, *batch, torch.Generator())
        assert parts["zero_gradient_share"].tolist() == [0, 0.25, 1]


def test_the_number_of_attack_steps_can_change_between_batches(setting):
    student, teacher, pixels, labels = setting
    arrest = make(teacher, replay_threshold=None)
    at = AdversarialTraining(arrest.attack, attack_steps=STEPS)
    trades = Trades(beta=1.0, eps=EPS, step_size=STEP, steps=STEPS, norm="linf")
    for objective in (arrest, at, trades):
        for steps in (STEPS, 1):
            objective.attack_steps = steps
            student.passes.clear()
            parts = objective(student, student, pixels, labels, torch.Generator().manual_seed(0))
            with_gradients = [count for count, training, gradients, _ in student.passes if gradients and not training]
            assert with_gradients == [12] * steps
            assert parts["attack_steps"].tolist() == [steps] * 12


def steady(student, pixels, labels):
    """What an attack that draws nothing finds; the student in eval mode."""
    student.eval()
    return pgd(lambda x: student(x).logits, pixels, labels, eps=EPS, step_size=STEP, steps=STEPS, start=pixels)


def make_steady(teacher, **changes):
    """An objective whose attack starts at the image itself."""
    values = {"rgkd_weight": 10.0, "replay_threshold": None, "attack_steps": STEPS} | changes

    def attack(logits_fn, pixels, labels, *, steps, generator=None):
        return pgd(logits_fn, pixels, labels, eps=EPS, step_size=STEP, steps=steps, start=pixels)

    return ArrestObjective(teacher, attack, partial(random_in_ball, eps=EPS, norm="linf"), **values)


def test_the_distance_at_the_clean_input_written_out(setting):
    student, teacher, pixels, labels = setting
    adversarial = steady(TinyClassifier(seed=0), pixels, labels).adversarial
    student.train()
    student.passes.clear()
    objective = make_steady(teacher, rgkd_input="clean")
    parts = objective(student, student, pixels, labels, torch.Generator())
    assert student.passes[-1] == (24, True, True, False), "one pass of both"
    assert objective.passes["training"] == 2
    output = TinyClassifier(seed=0).train()(torch.cat([adversarial, pixels]))
    wanted = F.cross_entropy(output.logits[:12], labels).double()
    target = teacher(pixels).representation
    wanted = wanted + 10.0 * reference_distance(output.representation[12:], target).mean()
    assert parts["loss"].item() == pytest.approx(wanted.item(), abs=1e-5)


@pytest.mark.parametrize("static_shapes", [False, True])
def test_a_batch_is_replayed_by_its_mean(setting, static_shapes):
    student, teacher, pixels, labels = setting
    drift = drift_of(student, teacher, pixels)
    mean = drift.mean().item()
    assert drift.min() < mean < drift.max()
    for threshold, replayed in ((mean - 1e-4, True), (mean + 1e-4, False)):
        objective = make_steady(teacher, replay_threshold=threshold, replay_by="batch", static_shapes=static_shapes)
        parts = objective(student, student, pixels, labels, torch.Generator().manual_seed(0))
        assert parts["replayed"].tolist() == [float(replayed)] * 12
        assert torch.allclose(parts["drift"].double(), drift, atol=1e-6), "each its own in the log"


@pytest.mark.parametrize("static_shapes", [False, True])
def test_the_clean_image_is_replayed(setting, static_shapes):
    student, teacher, pixels, labels = setting
    drift = drift_of(student, teacher, pixels)
    objective = make_steady(
        teacher, replay_threshold=drift.median().item(), replay_with="clean", static_shapes=static_shapes
    )
    before = pixels.clone()
    batch = objective.prepare(student, pixels, labels, torch.Generator().manual_seed(0))
    replayed = batch.parts["replayed"].bool()
    assert 0 < replayed.sum() < 12
    assert torch.equal(batch.inputs[replayed], pixels[replayed])
    assert torch.allclose(batch.inputs[~replayed], steady(student, pixels, labels).adversarial[~replayed], atol=1e-6)
    assert torch.equal(pixels, before), "the clean batch is not written into"


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_label_smoothing_written_out(setting, smoothing):
    student, _, pixels, labels = setting
    adversarial = steady(TinyClassifier(seed=0), pixels, labels).adversarial
    log_probs = TinyClassifier(seed=0).train()(adversarial).logits.double().log_softmax(1)
    targets = (1 - smoothing) * F.one_hot(labels, 3) + smoothing / 3
    wanted = -(targets * log_probs).sum(1)
    student.train()
    objective = make_steady(None, rgkd_weight=0.0, label_smoothing=smoothing)
    parts = objective(student, student, pixels, labels, torch.Generator())
    assert torch.allclose(parts["cross_entropy"].double(), wanted, atol=1e-5)
    assert parts["loss"].item() == pytest.approx(wanted.mean().item(), abs=1e-5)


@pytest.mark.parametrize(
    "wrong", [{"rgkd_input": "cleen"}, {"replay_by": "btch"}, {"replay_with": "cleen"}, {"rgkd_weight": -1.0}]
)
def test_an_option_that_is_misspelt_is_an_error(setting, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        make(setting[1], **wrong)


def test_angular_distance_of_bf16_is_computed_in_float32():
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(8, 32, generator=generator).bfloat16(), torch.randn(8, 32, generator=generator)
    assert torch.equal(angular_distance(u, v), angular_distance(u.float(), v))


@pytest.mark.parametrize("static_shapes", [False, True])
def test_the_attack_is_told_of_the_attacked_images_alone(static_shapes):
    def attack(logits_of, pixels, labels, *, steps, generator=None):
        return AttackResult(pixels, torch.ones(len(pixels)), torch.ones(len(pixels)))

    pixels = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels, student = torch.arange(8) % 3, TinyClassifier().eval()
    objective = ArrestObjective(
        TinyClassifier(seed=1).eval(), attack, lambda pixels, *, generator=None: pixels, rgkd_weight=1.0,
        replay_threshold=0.0, attack_steps=2, static_shapes=static_shapes,
    )  # fmt: skip
    drift = objective(student, student, pixels, labels, torch.Generator())["drift"]
    objective.replay_threshold = drift.median().item()
    parts = objective(student, student, pixels, labels, torch.Generator())
    assert 0 < parts["replayed"].sum() < 8
    assert torch.equal(parts["zero_gradient_share"], 1 - parts["replayed"])
    if not static_shapes:  # which attacks them all
        assert torch.equal(parts["attack_steps"], 1 - parts["replayed"])


def test_without_rgkd_there_is_no_second_training_pass():
    objective = ArrestObjective(
        None, None, None, rgkd_weight=0.0, replay_threshold=None, attack_steps=2, rgkd_input="clean"
    )
    assert objective.passes["training"] == 1
