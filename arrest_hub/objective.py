"""What the training loop minimises: the interface that the method and the baselines share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arrest_hub.attacks import AttackResult, LogitsFn

Clock = Callable[[str], AbstractContextManager[None]]
"""Around a part of a step, which it times: ``with clock("attack"):``."""

Attack = Callable[..., AttackResult]
"""`attacks.pgd` with its numbers filled in: what gives logits, pixels, labels, and by name steps, generator and, of
`Radii`, eps."""

Noise = Callable[..., Tensor]
"""`attacks.random_in_ball` with its numbers filled in: pixels, and by name the generator."""

Radii = Callable[[LogitsFn, Tensor, Tensor], Tensor]
"""`sample_eps.eps_by_sensitivity` with its numbers filled in: what gives logits, pixels, labels -> eps of each, [B]."""


def untimed(name: str) -> AbstractContextManager[None]:
    """A clock that times nothing."""
    return nullcontext()


@dataclass
class Prepared:
    """A batch that is ready for the pass that is trained."""

    inputs: Tensor
    """[N, 3, H, W], pixels in [0, 1]: adversarial, noisy or clean images, N being B or 2B."""
    labels: Tensor
    """[B]."""
    parts: dict[str, Tensor]
    """What is known so far, as `Objective.loss` returns it."""
    target: Tensor | None = None
    """[B, D], the teacher's representations."""


class Objective(ABC):
    """What the training loop minimises, in two halves: `prepare` attacks, `loss` is the pass that is trained.

    ``model`` is the student as wrapped for distributed training; ``student`` is the same network unwrapped, or a copy
    that is faster in eval mode. Both return `BackboneOutput`.
    """

    passes: dict[str, int]
    """Passes through a network per image, by name."""
    attack_steps: int = 0
    """Of the attack on the next batch, at most `passes` has; a schedule may change it between batches."""
    clock: Clock = staticmethod(untimed)
    """Is told when the passes other than "training" begin and end, by name."""

    @abstractmethod
    def prepare(self, student: nn.Module, pixels: Tensor, labels: Tensor, generator: torch.Generator) -> Prepared:
        """All passes but the trained one: pixels [B, 3, H, W] in [0, 1], labels [B]. Leaves no gradient behind."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Prepared) -> dict[str, Tensor]:
        """ "loss" (a scalar with a graph) and named parts, each a detached [B] tensor with a value per sample; calls
        ``model`` once."""

    def __call__(
        self, model: nn.Module, student: nn.Module, pixels: Tensor, labels: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """`prepare`, then `loss`."""
        return self.loss(model, self.prepare(student, pixels, labels, generator))


def attack_parts(zero_gradients: Tensor, steps: Tensor) -> dict[str, Tensor]:
    """Of an `AttackResult`, for the log: per sample, the share of the steps that found no gradient, and the steps."""
    return {"zero_gradient_share": zero_gradients / steps.clamp_min(1), "attack_steps": steps}


def classification_parts(
    logits: Tensor, labels: Tensor, accuracy: str, label_smoothing: float = 0.0
) -> dict[str, Tensor]:
    """Mean cross-entropy as "loss"; per sample "cross_entropy", and under the name ``accuracy`` whether it is
    classified correctly. [B, K], [B].

    ``label_smoothing``: the share of the target that all K classes have alike (Szegedy et al. 2016, arXiv 1512.00567,
    section 7).
    """
    cross_entropy = F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=label_smoothing)
    return {
        "loss": cross_entropy.mean(),
        "cross_entropy": cross_entropy.detach(),
        accuracy: (logits.detach().argmax(dim=1) == labels).float(),
    }
