"""What ARREST is compared with, through the same interface: standard training, adversarial training, TRADES."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arrest_hub.attacks import frozen_eval, pgd
from arrest_hub.objective import Attack, Objective, Prepared, Radii, attack_parts, classification_parts


class StandardObjective(Objective):
    """mean CE(f(x), y) on clean images: the standard (pre)training that makes the teacher."""

    def __init__(self) -> None:
        self.passes = {"training": 1}

    def prepare(self, student: nn.Module, pixels: Tensor, labels: Tensor, generator: torch.Generator) -> Prepared:
        return Prepared(pixels, labels, {})

    def loss(self, model: nn.Module, batch: Prepared) -> dict[str, Tensor]:
        return classification_parts(model(batch.inputs).logits, batch.labels, "clean_correct")


class AdversarialTraining(Objective):
    """mean CE(f(x'), y), x' from the attack (Madry et al. 2018, arXiv 1706.06083).

    ``label_smoothing`` and ``radii`` as in `arrest.ArrestObjective`.
    """

    def __init__(
        self, attack: Attack, *, attack_steps: int, label_smoothing: float = 0.0, radii: Radii | None = None
    ) -> None:
        self.attack, self.attack_steps = attack, attack_steps
        self.label_smoothing, self.radii = label_smoothing, radii
        self.passes = {"attack": attack_steps, "training": 1}
        if radii is not None:
            self.passes["sensitivity"] = 1

    def prepare(self, student: nn.Module, pixels: Tensor, labels: Tensor, generator: torch.Generator) -> Prepared:
        def logits(x: Tensor) -> Tensor:
            return student(x).logits

        with frozen_eval(student), self.clock("attack"):
            radii = {} if self.radii is None else {"eps": self.radii(logits, pixels, labels)}
            adversarial, zero_gradients, steps = self.attack(
                logits, pixels, labels, steps=self.attack_steps, generator=generator, **radii
            )
        return Prepared(adversarial, labels, attack_parts(zero_gradients, steps))

    def loss(self, model: nn.Module, batch: Prepared) -> dict[str, Tensor]:
        logits = model(batch.inputs).logits
        return batch.parts | classification_parts(logits, batch.labels, "adversarial_correct", self.label_smoothing)


class Trades(Objective):
    """mean CE(f(x), y) + beta * mean KL(f(x) || f(x')), x' maximising the divergence (Zhang et al. 2019,
    arXiv 1901.08573, equations 5 and 7).

    The attack starts from Gaussian noise of standard deviation 0.001 as in the authors' description. Clean and
    adversarial images go through the network in ONE training pass of 2B images, so that BatchNorm sees both
    together and a distributed wrapper is called once. ``label_smoothing``: of the cross-entropy, see
    `classification_parts`.
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
        label_smoothing: float = 0.0,
    ) -> None:
        self.beta = beta
        self.eps, self.step_size, self.attack_steps, self.norm = eps, step_size, steps, norm
        self.gradient_scale, self.images_at_once = gradient_scale, images_at_once
        self.label_smoothing = label_smoothing
        self.passes = {"attack": steps, "clean": 1, "training": 2}

    def prepare(self, student: nn.Module, pixels: Tensor, labels: Tensor, generator: torch.Generator) -> Prepared:
        with frozen_eval(student):
            with self.clock("clean"), torch.no_grad():
                clean_logits = student(pixels).logits.float()
            start = pixels + 0.001 * torch.empty_like(pixels).normal_(generator=generator)
            with self.clock("attack"):
                adversarial, zero_gradients, steps = pgd(
                    lambda x: student(x).logits,
                    pixels,
                    clean_logits,
                    eps=self.eps,
                    step_size=self.step_size,
                    steps=self.attack_steps,
                    norm=self.norm,
                    start=start.clamp(0.0, 1.0),
                    loss_fn=divergence_ascent,
                    gradient_scale=self.gradient_scale,
                    images_at_once=self.images_at_once,
                )
        return Prepared(torch.cat([pixels, adversarial]), labels, attack_parts(zero_gradients, steps))

    def loss(self, model: nn.Module, batch: Prepared) -> dict[str, Tensor]:
        clean, robust = model(batch.inputs).logits.float().chunk(2)
        distance = divergence(clean.log_softmax(dim=1), robust.log_softmax(dim=1))
        parts = batch.parts | classification_parts(clean, batch.labels, "clean_correct", self.label_smoothing)
        parts["loss"] = parts["loss"] + self.beta * distance.mean()
        parts["adversarial_correct"] = (robust.detach().argmax(dim=1) == batch.labels).float()
        return parts | {"distance": distance.detach()}


def divergence_ascent(logits: Tensor, clean_logits: Tensor) -> Tensor:
    """What an attack ascends to raise KL(p || q) of each row, p being the clean prediction: [B, K], [B, K] -> [B].

    ``logits`` may be of any floating type, ``clean_logits`` are float32. The gradient to the logits is that of
    `divergence` (see `Trades`), q - p, made as long as 1 (the sum of its absolute values); the value is no divergence.

    Near the clean image, where TRADES' attack begins, q - p is next to nothing: its digits are lost where p is near 1,
    and in fp16 it would be 0 in the layers behind, so that the attack never left its start. Hence q - p = p (q / p - 1)
    (ours), from what the logits have changed by: relative to the class of the clean prediction, so that nothing
    cancels.
    """
    logits = logits.float()
    with torch.no_grad():
        p = clean_logits.softmax(dim=1)
        change = logits - clean_logits
        change -= change.gather(1, clean_logits.argmax(dim=1, keepdim=True))
        far = change.amax(dim=1, keepdim=True) > 80.0  # beyond exp's range, where q - p has all its digits
        log_ratio = change - (p * change.expm1()).sum(dim=1, keepdim=True).log1p()  # log(q / p)
        uphill = torch.where(far, logits.softmax(dim=1) - p, p * log_ratio.expm1())
        uphill /= uphill.abs().sum(dim=1, keepdim=True).clamp_min(torch.finfo(uphill.dtype).tiny)
    return (uphill * logits).sum(dim=1)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row of log-probabilities: [B, K], [B, K] -> [B], in nats."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)
