"""ARREST's training step around other attacks, as one writes it with them: what `step.py` compares with.

All do the same work: the teacher's pass and the drift's over the clean images, K attack steps, one trained pass of
cross-entropy and angular distance, one update. Images as torch makes them (not channels_last), the network as loaded.
"""

from __future__ import annotations

import copy
from importlib.metadata import version
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arrest_hub.arrest import angular_distance
from arrest_hub.backbones import Backbone
from arrest_hub.config import FinetuneConfig
from arrest_hub.data import to_pixels
from arrest_hub.estimate import idle_optimizer, random_batch, wait_for
from arrest_hub.step import AUTOCAST


class Logits(nn.Module):
    """Pixels in [0, 1] -> logits, as other libraries expect a network."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, pixels: Tensor) -> Tensor:
        return self.backbone(pixels).logits


class PlainLoop:
    """A plain PyTorch loop as the papers' repositories write it: ``loss.backward()``, parameters needing gradients."""

    name = "plain loop"

    def __init__(self, config: FinetuneConfig, network: Backbone, device: torch.device) -> None:
        self.config, self.device = config, device
        self.student = copy.deepcopy(network).to(device)
        self.teacher = copy.deepcopy(network).to(device).eval().requires_grad_(False)
        self.model = Logits(self.student)
        self.optimizer = idle_optimizer(config, self.student)
        self.batch = random_batch(network, config.batch_size, device)
        self.eps, self.step_size, self.steps = config.eps_value, config.step_size_value, config.attack_steps

    def attack(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Adversarial examples for the student in eval mode."""
        adversarial = (pixels + torch.empty_like(pixels).uniform_(-self.eps, self.eps)).clamp(0, 1)
        for _ in range(self.steps):
            adversarial.requires_grad_(True)
            loss = F.cross_entropy(self.model(adversarial), labels)
            loss.backward()
            moved = adversarial.detach() + self.step_size * adversarial.grad.sign()
            adversarial = (pixels + (moved - pixels).clamp(-self.eps, self.eps)).clamp(0, 1)
        return adversarial

    def step(self) -> None:
        """One training step, until the device has done it."""
        pixels, labels = to_pixels(self.batch["pixels"]), self.batch["label"]
        dtype = AUTOCAST[self.config.mixed_precision]
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            self.student.eval()
            with torch.no_grad():
                target = self.teacher(pixels).representation
                angular_distance(self.student(pixels).representation, target)
            adversarial = self.attack(pixels, labels)
            self.student.train()
            self.optimizer.zero_grad()
            output = self.student(adversarial)
            distance = angular_distance(output.representation, target).mean()
            loss = F.cross_entropy(output.logits, labels) + self.config.rgkd_weight * distance
        loss.backward()
        self.optimizer.step()
        wait_for(self.device)


class Torchattacks(PlainLoop):
    """torchattacks' PGD."""

    name = "torchattacks"

    def attack(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """See `PlainLoop.attack`."""
        import torchattacks

        return torchattacks.PGD(self.model, eps=self.eps, alpha=self.step_size, steps=self.steps)(pixels, labels)


class Foolbox(PlainLoop):
    """foolbox' LinfPGD."""

    name = "foolbox"

    def attack(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """See `PlainLoop.attack`."""
        import foolbox

        attack = foolbox.attacks.LinfPGD(steps=self.steps, abs_stepsize=self.step_size, random_start=True)
        model = foolbox.PyTorchModel(self.model.eval(), bounds=(0, 1), device=self.device)
        return attack(model, pixels, labels, epsilons=self.eps)[1]


class Robustness(PlainLoop):
    """The attacker of MadryLab's robustness 1.2.1, written out: the package's own needs CUDA.

    As its `Attacker.forward` with its defaults for training does: gradients to the pixels alone, the worst example so
    far kept (``use_best``), which takes a last pass (robustness/attacker.py of that release).
    """

    name = "robustness (written out)"

    def attack(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """See `PlainLoop.attack`."""
        best, best_loss = None, None

        def keep_worst(candidate: Tensor, losses: Tensor) -> None:
            nonlocal best, best_loss
            if best is None or best_loss is None:
                best, best_loss = candidate.clone().detach(), losses.clone().detach()
                return
            worse = best_loss < losses
            best[worse], best_loss[worse] = candidate[worse].clone().detach(), losses[worse].detach()

        adversarial = (pixels + 2 * (torch.rand_like(pixels) - 0.5) * self.eps).clamp(0, 1)
        for _ in range(self.steps):
            adversarial = adversarial.clone().detach().requires_grad_(True)
            losses = F.cross_entropy(self.model(adversarial), labels, reduction="none")
            (gradient,) = torch.autograd.grad(losses.mean(), [adversarial])
            with torch.no_grad():
                keep_worst(adversarial, losses)
                moved = adversarial + gradient.sign() * self.step_size
                adversarial = (pixels + (moved - pixels).clamp(-self.eps, self.eps)).clamp(0, 1)
        with torch.no_grad():
            losses = F.cross_entropy(self.model(adversarial), labels, reduction="none")
            keep_worst(adversarial, losses)
        assert best is not None
        return best


PEERS = {"plain": PlainLoop, "torchattacks": Torchattacks, "foolbox": Foolbox, "robustness": Robustness}
LIBRARIES = {"torchattacks": "torchattacks", "foolbox": "foolbox"}


def library_version(peer: str) -> str | None:
    """Of the library that a peer needs; "" where it needs none, None where it is not installed."""
    name = LIBRARIES.get(peer)
    if name is None:
        return ""
    return version(name) if find_spec(name) else None
