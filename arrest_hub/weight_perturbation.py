"""Adversarial weight perturbation (Wu et al. 2020, arXiv 2004.05884): the trained pass at the worst weights nearby."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def unchanged(tensors: Sequence[Tensor]) -> Iterator[None]:
    """After this context the tensors are again what they were before it."""
    before = [tensor.clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)


class WeightPerturbation:
    """Moves the weights of ``student`` against the loss for the time of a pass, equation 8 with one step:

        w <- w + gamma |w| g / |g|,  g = the gradient of the loss to w,

    for each weight of two or more dimensions, with its own norms (biases and normalisation stay, as in the authors'
    code, github.com/csdongxian/AWP, AT_AWP/utils_awp.py). One more forward and backward pass to the parameters.

    Args:
        gamma: the size of the perturbation, relative to the weight's norm.
        gradient_scale: factor on the loss that keeps fp16 gradients from underflowing; the direction does not depend
            on it.
        average: the mean of a tensor over all processes, so that all perturb alike; default: there is one.
    """

    def __init__(
        self,
        student: nn.Module,
        gamma: float,
        *,
        gradient_scale: float = 1.0,
        average: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        self.student, self.gamma, self.gradient_scale, self.average = student, gamma, gradient_scale, average
        self.weights = [weight for weight in student.parameters() if weight.requires_grad and weight.dim() > 1]

    @contextmanager
    def worst_case(self, loss: Callable[[], Tensor]) -> Iterator[None]:
        """Within this context the weights are perturbed; then they are again what they were, to the last bit.

        ``loss`` makes the scalar to be raised, by a pass through the student; BatchNorm's statistics stay as they were.
        """
        with unchanged(list(self.student.buffers())):
            gradients = torch.autograd.grad(loss() * self.gradient_scale, self.weights, allow_unused=True)
        with torch.no_grad():
            flat = [
                torch.zeros_like(weight, dtype=torch.float32).flatten()
                if gradient is None
                else gradient.float().flatten()
                for weight, gradient in zip(self.weights, gradients, strict=True)
            ]
            # a half-precision gradient may overflow, and only its direction matters
            averaged = self.average(torch.cat(flat)).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
            saved = [weight.detach().clone() for weight in self.weights]
            directions = averaged.split([weight.numel() for weight in self.weights])
        try:
            with torch.no_grad():
                for weight, direction in zip(self.weights, directions, strict=True):
                    length = torch.linalg.vector_norm(direction).clamp_min(1e-30)
                    size = self.gamma * torch.linalg.vector_norm(weight) / length
                    weight.add_((size * direction).view_as(weight))
            torch.clear_autocast_cache()  # within one autocast the next pass would have the weights of the last
            yield
        finally:
            with torch.no_grad():
                for weight, before in zip(self.weights, saved, strict=True):
                    weight.copy_(before)
            torch.clear_autocast_cache()
