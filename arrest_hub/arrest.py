"""The method: ARREST (Suzuki et al., ICCV 2023, arXiv 2308.16454) as an objective.

AFT: adversarial finetuning from a standardly pretrained network. RGKD: the angular distance between the
student's representation of the adversarial example and the frozen teacher's of the clean one is penalised.
NR: samples whose representation has drifted beyond a threshold are replayed with noise, not attacked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arrest_hub.attacks import AttackResult, frozen_eval

Clock = Callable[[str], AbstractContextManager[None]]
"""Around a part of a step, which it times: ``with clock("attack"):``."""


def untimed(name: str) -> AbstractContextManager[None]:
    """A clock that times nothing."""
    return nullcontext()


class Attack(Protocol):
    """`attacks.pgd` with its numbers filled in, but for the steps."""

    def __call__(
        self,
        logits_fn: Callable[[Tensor], Tensor],
        pixels: Tensor,
        labels: Tensor,
        *,
        steps: int,
        generator: torch.Generator | None = None,
    ) -> AttackResult: ...


class Noise(Protocol):
    """`attacks.random_in_ball` with its numbers filled in."""

    def __call__(self, pixels: Tensor, *, generator: torch.Generator | None = None) -> Tensor: ...


class Objective(Protocol):
    """What the training loop minimises.

    ``model`` is the student as wrapped for distributed training: called once, for the pass that is trained.
    ``student`` is the same network unwrapped, or a copy that is faster in eval mode, for everything else. Returns
    "loss" (a scalar with a graph) and named parts, each a detached [B] tensor with a value per sample. Both return
    `BackboneOutput`.
    """

    passes: dict[str, int]
    """Passes through a network per image, by name."""
    attack_steps: int
    """Of the attack on the next batch, at most `passes` has; a schedule may change it between batches."""
    clock: Clock
    """Is told when the passes other than "training" begin and end, by name."""

    def __call__(
        self, model: nn.Module, student: nn.Module, pixels: Tensor, labels: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]: ...


def angular_distance(u: Tensor, v: Tensor) -> Tensor:
    """arccos(<u, v> / |u||v|) / pi of each pair of rows: [B, D], [B, D] -> [B], in [0, 1].

    Computed in fp32 or wider, also under autocast, as 2 atan2(|u' - v'|, |u' + v'|) / pi of the unit vectors u', v'
    (the angle formula of W. Kahan): exact to rounding and with a finite gradient everywhere, also at u = v and
    u = -v, where that of arccos is infinite.
    """
    with torch.autocast(device_type=u.device.type, enabled=False):
        if u.dtype in (torch.float16, torch.bfloat16):
            u = u.float()
        v = v.to(u.dtype)
        u, v = F.normalize(u, dim=1), F.normalize(v, dim=1)
        difference = torch.linalg.vector_norm(u - v, dim=1)
        total = torch.linalg.vector_norm(u + v, dim=1)
        return 2 * torch.atan2(difference, total) / math.pi


class ArrestObjective:
    """mean CE(f(x'), y) + rgkd_weight * mean D(h(x'), h_T(x)), with noisy replay in place of x' beyond the threshold.

    Args:
        teacher: the frozen standardly pretrained network in eval mode; may be None if neither part needs it.
        attack, noise: `attacks.pgd` and `attacks.random_in_ball` with their numbers filled in, but for the steps.
        rgkd_weight: lambda; 0 switches RGKD off.
        replay_threshold: tau, in [0, 1]; None switches NR off and saves its pass.
        static_shapes: attack the whole batch, also what is replayed, and choose afterwards: the same result (but for
            the draw of the attack's start) for more work, with passes of the same number and shape in every step.
    Raises:
        ValueError: a part needs the teacher and there is none.
    """

    def __init__(
        self,
        teacher: nn.Module | None,
        attack: Attack,
        noise: Noise,
        *,
        rgkd_weight: float,
        replay_threshold: float | None,
        attack_steps: int,
        static_shapes: bool = False,
    ) -> None:
        self.use_teacher = rgkd_weight > 0 or replay_threshold is not None
        if self.use_teacher and teacher is None:
            raise ValueError("RGKD and NR compare with a teacher: give one, or rgkd_weight 0 and replay_threshold None")
        self.teacher = teacher
        self.attack = attack
        self.noise = noise
        self.rgkd_weight = rgkd_weight
        self.replay_threshold = replay_threshold
        self.static_shapes = static_shapes
        self.clock: Clock = untimed
        self.attack_steps = attack_steps
        self.passes = {"attack": attack_steps, "training": 1}
        if self.use_teacher:
            self.passes["teacher"] = 1
        if replay_threshold is not None:
            self.passes["drift"] = 1

    def __call__(
        self, model: nn.Module, student: nn.Module, pixels: Tensor, labels: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {}
        target: Tensor | None = None
        replayed: Tensor | None = None
        with frozen_eval(student):
            if self.teacher is not None and self.use_teacher:
                with self.clock("teacher"), torch.no_grad():
                    target = self.teacher(pixels).representation
            if self.replay_threshold is not None:
                assert target is not None
                # the decision needs the clean image alone, so it is made first and saves the attack
                with self.clock("drift"), torch.no_grad():
                    clean = student(pixels)
                    drift = angular_distance(clean.representation, target)
                replayed = drift > self.replay_threshold
                parts |= {"drift": drift, "replayed": replayed.float()}
                parts["clean_correct"] = (clean.logits.argmax(dim=1) == labels).float()
            with self.clock("attack"):
                inputs, zero_gradients, steps = self._inputs(student, pixels, labels, replayed, generator)
            parts |= attack_parts(zero_gradients, steps)

        output = model(inputs)
        cross_entropy = F.cross_entropy(output.logits.float(), labels, reduction="none")
        loss = cross_entropy.mean()
        if self.rgkd_weight > 0:
            assert target is not None
            distance = angular_distance(output.representation, target)
            loss = loss + self.rgkd_weight * distance.mean()
            parts["distance"] = distance.detach()
        parts["loss"] = loss
        parts["cross_entropy"] = cross_entropy.detach()
        parts["adversarial_correct"] = (output.logits.detach().argmax(dim=1) == labels).float()
        return parts

    def _inputs(
        self, student: nn.Module, pixels: Tensor, labels: Tensor, replayed: Tensor | None, generator: torch.Generator
    ) -> AttackResult:
        """What the student is trained on: adversarial, or noisy where replayed."""

        def attack(some: Tensor, labels: Tensor) -> AttackResult:
            return self.attack(lambda x: student(x).logits, some, labels, steps=self.attack_steps, generator=generator)

        if replayed is None or (not self.static_shapes and not replayed.any()):
            return attack(pixels, labels)
        if self.static_shapes:
            found = attack(pixels, labels)
            chosen = replayed.view(-1, *[1] * (pixels.dim() - 1))
            noisy = self.noise(pixels, generator=generator)
            inputs = torch.where(chosen, noisy, found.adversarial)
            return AttackResult(inputs, found.zero_gradients * ~replayed, found.steps)
        inputs = self.noise(pixels, generator=generator)
        zero_gradients, steps = torch.zeros(2, len(pixels), device=pixels.device)
        attacked = (~replayed).nonzero().squeeze(1)
        if len(attacked):
            found = attack(pixels[attacked], labels[attacked])
            inputs[attacked] = found.adversarial
            zero_gradients[attacked], steps[attacked] = found.zero_gradients, found.steps
        return AttackResult(inputs, zero_gradients, steps)


def attack_parts(zero_gradients: Tensor, steps: Tensor) -> dict[str, Tensor]:
    """Of an `AttackResult`, for the log: per sample, the share of the steps that found no gradient, and the steps."""
    return {"zero_gradient_share": zero_gradients / steps.clamp_min(1), "attack_steps": steps}
