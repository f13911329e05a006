"""An eps for each sample at a fixed total budget: less where the network is sensitive, more where it is not.

After instance-adaptive adversarial training (Balaji et al. 2019, arXiv 1910.08051) and customized adversarial training
(Cheng et al. 2020, arXiv 2002.06789), which search each sample's eps over the epochs. Here it follows from one gradient
and the mean stays what it was, so that a comparison with one eps for all is one at the same budget.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arrest_hub.attacks import LogitsFn, margin

HALVINGS = 40


def sensitivity(
    logits_fn: LogitsFn, pixels: Tensor, labels: Tensor, *, norm: str, gradient_scale: float = 1.0
) -> Tensor:
    """By how much a perturbation of size 1 raises the margin, to first order: its gradient's norm, L1 for linf and L2
    for l2. [B, C, H, W] in [0, 1], [B] -> [B]. One forward pass and one backward pass to the pixels.

    Where the gradient overflows, as it may in half precision, the largest of those that do not.
    Raises ValueError for an unknown norm.
    """
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm {norm!r} is not one of linf, l2")
    here = pixels.detach().requires_grad_(True)
    with torch.enable_grad():
        loss = margin(logits_fn(here), labels).sum() * gradient_scale
    (gradient,) = torch.autograd.grad(loss, here)
    gradient = gradient.float() / gradient_scale
    values = torch.linalg.vector_norm(gradient.flatten(1), ord=1 if norm == "linf" else 2, dim=1)
    finite = values.isfinite()
    return torch.where(finite, values, torch.where(finite, values, 0.0).max())


def share_budget(values: Tensor, *, eps: float, spread: float) -> Tensor:
    """eps_i proportional to 1 / values_i, clipped to eps (1 - spread) and eps (1 + spread), of mean ``eps``: [B], [B].

    The factor of proportion is found by halving, so that both the bounds and the mean hold. Equal values: eps for all.
    """
    low, high = 1 - spread, 1 + spread
    inverse = 1 / (values / values.mean().clamp_min(1e-30)).clamp_min(1e-6)
    # the mean of clip(c / v) grows with c: at the first everything is at the lower bound, at the second at the upper
    few, many = low / inverse.max(), high / inverse.min()
    few = few.clamp_min(1e-12 * many)  # a spread of 1 has a lower bound of 0
    for _ in range(HALVINGS):
        middle = (few * many).sqrt()
        above = (middle * inverse).clamp(low, high).mean() > 1
        few, many = torch.where(above, few, middle), torch.where(above, middle, many)
    return eps * (few * many).sqrt().mul(inverse).clamp(low, high)


def eps_by_sensitivity(
    logits_fn: LogitsFn,
    pixels: Tensor,
    labels: Tensor,
    *,
    eps: float,
    spread: float,
    norm: str,
    gradient_scale: float = 1.0,
) -> Tensor:
    """`share_budget` by `sensitivity`, over the batch: [B, C, H, W] in [0, 1], [B] -> eps of each image, [B]."""
    values = sensitivity(logits_fn, pixels, labels, norm=norm, gradient_scale=gradient_scale)
    return share_budget(values, eps=eps, spread=spread)
