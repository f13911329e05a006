"""What ARREST is compared with, through the same interface: standard training, adversarial training, TRADES."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arrest_hub.arrest import Attack, Clock, attack_parts, untimed
from arrest_hub.attacks import frozen_eval, pgd


class StandardObjective:
    """mean CE(f(x), y) on clean images: the standard (pre)training that makes the teacher."""

    def __init__(self) -> None:
        self.attack_steps = 0
        self.passes = {"training": 1}
        self.clock: Clock = untimed

    def __call__(
        self, model: nn.Module, student: nn.Module, pixels: Tensor, labels: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        return classification_parts(model(pixels).logits, labels, "clean_correct")


class AdversarialTraining:
    """mean CE(f(x'), y), x' from the attack (Madry et al. 2018, arXiv 1706.06083)."""

    def __init__(self, attack: Attack, *, attack_steps: int) -> None:
        self.attack, self.attack_steps = attack, attack_steps
        self.passes = {"attack": attack_steps, "training": 1}
        self.clock: Clock = untimed

    def __call__(
        self, model: nn.Module, student: nn.Module, pixels: Tensor, labels: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        with frozen_eval(student), self.clock("attack"):
            adversarial, zero_gradients, steps = self.attack(
                lambda x: student(x).logits, pixels, labels, steps=self.attack_steps, generator=generator
            )
        parts = classification_parts(model(adversarial).logits, labels, "adversarial_correct")
        return parts | attack_parts(zero_gradients, steps)


class Trades:
    """mean CE(f(x), y) + beta * mean KL(f(x) || f(x')), x' maximising the divergence (Zhang et al. 2019,
    arXiv 1901.08573, equations 5 and 7).

    The attack starts from Gaussian noise of standard deviation 0.001 as in the authors' description. Clean and
    adversarial images go through the network in ONE training pass of 2B images, so that BatchNorm sees both
    together and a distributed wrapper is called once.
    """

    def __init__(
        self,
        *,
        beta: float,
        eps: float,
        step_size: float | None,
        steps: int,
        norm: str,
        gradient_scale: float = 1.0,
        images_at_once: int | None = None,
    ) -> None:
        self.beta = beta
        self.eps, self.step_size, self.attack_steps, self.norm = eps, step_size, steps, norm
        self.gradient_scale, self.images_at_once = gradient_scale, images_at_once
        self.passes = {"attack": steps, "clean": 1, "training": 2}
        self.clock: Clock = untimed

    def __call__(
        self, model: nn.Module, student: nn.Module, pixels: Tensor, labels: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        with frozen_eval(student):
            with self.clock("clean"), torch.no_grad():
                clean_log_probs = student(pixels).logits.float().log_softmax(dim=1)
            start = pixels + 0.001 * torch.empty_like(pixels).normal_(generator=generator)
            with self.clock("attack"):
                adversarial, zero_gradients, steps = pgd(
                    lambda x: student(x).logits,
                    pixels,
                    clean_log_probs,
                    eps=self.eps,
                    step_size=self.step_size,
                    steps=self.attack_steps,
                    norm=self.norm,
                    start=start.clamp(0.0, 1.0),
                    loss_fn=lambda logits, clean: divergence(clean, logits.float().log_softmax(dim=1)),
                    gradient_scale=self.gradient_scale,
                    images_at_once=self.images_at_once,
                )
        clean, robust = model(torch.cat([pixels, adversarial])).logits.float().chunk(2)
        distance = divergence(clean.log_softmax(dim=1), robust.log_softmax(dim=1))
        parts = classification_parts(clean, labels, "clean_correct")
        parts["loss"] = parts["loss"] + self.beta * distance.mean()
        parts["adversarial_correct"] = (robust.detach().argmax(dim=1) == labels).float()
        return parts | {"distance": distance.detach()} | attack_parts(zero_gradients, steps)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row of log-probabilities: [B, K], [B, K] -> [B], in nats."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)


def classification_parts(logits: Tensor, labels: Tensor, accuracy: str) -> dict[str, Tensor]:
    """Mean cross-entropy as "loss"; per sample "cross_entropy", and under the name ``accuracy`` whether it is
    classified correctly. [B, K], [B]."""
    cross_entropy = F.cross_entropy(logits.float(), labels, reduction="none")
    return {
        "loss": cross_entropy.mean(),
        "cross_entropy": cross_entropy.detach(),
        accuracy: (logits.detach().argmax(dim=1) == labels).float(),
    }
