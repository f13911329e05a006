"""The method: ARREST (Suzuki et al., ICCV 2023, arXiv 2308.16454) as an objective.

AFT: adversarial finetuning from a standardly pretrained network. RGKD: the angular distance between the
student's representation of the adversarial example and the frozen teacher's of the clean one is penalised.
NR: samples whose representation has drifted beyond a threshold are replayed with noise, not attacked.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arrest_hub.attacks import AttackResult, frozen_eval, per_sample
from arrest_hub.objective import Attack, Noise, Objective, Prepared, Radii, attack_parts, classification_parts


def angular_distance(u: Tensor, v: Tensor) -> Tensor:
    """arccos(<u, v> / |u||v|) / pi of each pair of rows: [B, D], [B, D] -> [B], in [0, 1].

    Computed in fp32 or wider, also under autocast, as 2 atan2(|u' - v'|, |u' + v'|) / pi of the unit vectors u', v'
    (the angle formula of W. Kahan): exact to rounding for norms between 1e-12 and 1e18, and with a finite gradient
    everywhere, also at u = v and u = -v, where that of arccos is infinite.
    """
    with torch.autocast(device_type=u.device.type, enabled=False):
        if u.dtype in (torch.float16, torch.bfloat16):
            u = u.float()
        v = v.to(u.dtype)
        u, v = F.normalize(u, dim=1), F.normalize(v, dim=1)
        difference = torch.linalg.vector_norm(u - v, dim=1)
        total = torch.linalg.vector_norm(u + v, dim=1)
        return 2 * torch.atan2(difference, total) / math.pi


class ArrestObjective(Objective):
    """mean CE(f(x'), y) + rgkd_weight * mean D(h(x'), h_T(x)), with noisy replay in place of x' beyond the threshold.

    Args:
        teacher: the frozen standardly pretrained network in eval mode; may be None if neither part needs it.
        attack, noise: `attacks.pgd` and `attacks.random_in_ball` with their numbers filled in, but for the steps.
        rgkd_weight: lambda; 0 switches RGKD off.
        replay_threshold: tau, in [0, 1]; None switches NR off and saves its pass.
        rgkd_input: what the student's representation in the distance is of: "adversarial" (x'), or "clean" (x), for
            which the trained pass is of both, 2B images.
        replay_by: "sample" (each by its own drift) or "batch" (all of them where the batch's mean is beyond).
        replay_with: "noise", or "clean" (the image as it is).
        label_smoothing: of the cross-entropy, see `classification_parts`.
        radii: gives each image an eps of its own, which the attack then takes; the noise keeps its own.
        static_shapes: attack the whole batch, also what is replayed, and choose afterwards: the same result (but for
            the draw of the attack's start) for more work, with passes of the same number and shape in every step.
    Raises:
        ValueError: a part needs the teacher and there is none, or an option has none of its values.
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
        rgkd_input: str = "adversarial",
        replay_by: str = "sample",
        replay_with: str = "noise",
        label_smoothing: float = 0.0,
        radii: Radii | None = None,
        static_shapes: bool = False,
    ) -> None:
        for name, value, values in (
            ("rgkd_input", rgkd_input, ("adversarial", "clean")),
            ("replay_by", replay_by, ("sample", "batch")),
            ("replay_with", replay_with, ("noise", "clean")),
        ):
            if value not in values:
                raise ValueError(f"{name} {value!r} is not one of {', '.join(values)}")
        if rgkd_weight < 0:
            raise ValueError(f"rgkd_weight {rgkd_weight} is below 0, which would drive the representations apart")
        self.use_teacher = rgkd_weight > 0 or replay_threshold is not None
        if self.use_teacher and teacher is None:
            raise ValueError("RGKD and NR compare with a teacher: give one, or rgkd_weight 0 and replay_threshold None")
        self.teacher = teacher
        self.attack = attack
        self.noise = noise
        self.rgkd_weight = rgkd_weight
        self.replay_threshold = replay_threshold
        self.clean_distance = rgkd_weight > 0 and rgkd_input == "clean"
        self.replay_by, self.replay_with = replay_by, replay_with
        self.label_smoothing = label_smoothing
        self.radii = radii
        self.static_shapes = static_shapes
        self.attack_steps = attack_steps
        self.passes = {"attack": attack_steps, "training": 2 if self.clean_distance else 1}
        if self.use_teacher:
            self.passes["teacher"] = 1
        if replay_threshold is not None:
            self.passes["drift"] = 1
        if radii is not None:
            self.passes["sensitivity"] = 1

    def prepare(self, student: nn.Module, pixels: Tensor, labels: Tensor, generator: torch.Generator) -> Prepared:
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
                deciding = drift.mean().expand_as(drift) if self.replay_by == "batch" else drift
                replayed = deciding > self.replay_threshold
                parts |= {"drift": drift, "replayed": replayed.float()}
                parts["clean_correct"] = (clean.logits.argmax(dim=1) == labels).float()
            with self.clock("attack"):
                inputs, zero_gradients, steps = self._inputs(student, pixels, labels, replayed, generator)
            parts |= attack_parts(zero_gradients, steps)
        if self.clean_distance:
            inputs = torch.cat([inputs, pixels])
        return Prepared(inputs, labels, parts, target)

    def loss(self, model: nn.Module, batch: Prepared) -> dict[str, Tensor]:
        count = len(batch.labels)
        output = model(batch.inputs)
        parts = batch.parts | classification_parts(
            output.logits[:count], batch.labels, "adversarial_correct", self.label_smoothing
        )
        if self.rgkd_weight > 0:
            assert batch.target is not None
            distance = angular_distance(output.representation[-count:], batch.target)
            parts["loss"] = parts["loss"] + self.rgkd_weight * distance.mean()
            parts["distance"] = distance.detach()
        return parts

    def _inputs(
        self, student: nn.Module, pixels: Tensor, labels: Tensor, replayed: Tensor | None, generator: torch.Generator
    ) -> AttackResult:
        """What the student is trained on: adversarial, or noisy where replayed."""

        def logits(x: Tensor) -> Tensor:
            return student(x).logits

        eps = None if self.radii is None else self.radii(logits, pixels, labels)

        def attack(which: slice | Tensor) -> AttackResult:
            radii = {} if eps is None else {"eps": eps[which]}
            return self.attack(
                logits, pixels[which], labels[which], steps=self.attack_steps, generator=generator, **radii
            )

        def replay() -> Tensor:
            return pixels.clone() if self.replay_with == "clean" else self.noise(pixels, generator=generator)

        if replayed is None:
            return attack(slice(None))
        if self.static_shapes:
            found = attack(slice(None))
            inputs = torch.where(per_sample(replayed, pixels), replay(), found.adversarial)
            return AttackResult(inputs, found.zero_gradients * ~replayed, found.steps)
        attacked = (~replayed).nonzero().squeeze(1)  # waits for the device, once
        if len(attacked) == len(pixels):
            return attack(slice(None))
        inputs = replay()
        zero_gradients, steps = torch.zeros(2, len(pixels), device=pixels.device)
        if len(attacked):
            found = attack(attacked)
            inputs[attacked] = found.adversarial
            zero_gradients[attacked], steps[attacked] = found.zero_gradients, found.steps
        return AttackResult(inputs, zero_gradients, steps)
