"""Attacks: pure functions of tensors and floats, on pixels in [0, 1].

No parameter gradient is ever computed here: the gradient with respect to the pixels comes from
`torch.autograd.grad`, so nothing is accumulated, and no collective is started in a distributed run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from arrest_hub.attack_schedule import default_step_size

LogitsFn = Callable[[Tensor], Tensor]

TINY = torch.finfo(torch.float32).tiny


class AttackResult(NamedTuple):
    """What an attack found."""

    adversarial: Tensor
    """[B, C, H, W], pixels in [0, 1], inside the ball; to rounding where the pixels are in half precision."""
    zero_gradients: Tensor
    """[B], in how many steps the whole input gradient of a sample was zero or NaN (a sign of gradient masking)."""
    steps: Tensor
    """[B], in how many steps the gradient of a sample was computed."""


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Whatever happens within this context, each module is afterwards in the mode (training or not) it was in before:
    a frozen BatchNorm of a network in training, say."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:  # a module comes before its parts, which it takes along
            if module.training is not mode:
                module.train(mode)


@contextmanager
def frozen_eval(model: nn.Module) -> Iterator[None]:
    """Within this context the model is in eval mode and its parameters need no gradient; both are restored,
    module by module and parameter by parameter.

    The attack then neither touches BatchNorm's statistics nor pays for parameter gradients.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with modes_kept(model):
        model.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """logsumexp of the other classes' logits minus the true class's: [B, K], [B] -> [B].

    Cross-entropy is softplus of this margin, so per sample both have the same gradient direction; but
    cross-entropy multiplies it by the probability of being wrong, which rounds to zero for a confident
    sample. The margin's gradient stays of order one, in fp16 too.
    """
    logits = logits.float()
    labels = labels.unsqueeze(1)
    others = logits.scatter(1, labels, float("-inf"))
    return others.logsumexp(dim=1) - logits.gather(1, labels).squeeze(1)


def sample_norm(x: Tensor) -> Tensor:
    """L2 norm of each sample: [B, C, H, W] -> [B, 1, 1, 1]."""
    return per_sample(x.flatten(1).norm(dim=1), x)


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ..., 1], to go with ``like``, [B, ...]."""
    return value.view(-1, *[1] * (like.dim() - 1))


def project(perturbed: Tensor, pixels: Tensor, *, eps: float | Tensor, norm: str) -> Tensor:
    """The nearest point to ``perturbed`` in the eps-ball around ``pixels``, then clipped to [0, 1].

    ``eps``: one for all or [B]. ``pixels`` being in [0, 1], the clip never leaves the ball. Raises ValueError for an
    unknown norm.
    """
    delta = perturbed - pixels
    if isinstance(eps, Tensor):
        eps = per_sample(eps, pixels)
    if norm == "linf":
        delta = torch.minimum(torch.maximum(delta, -eps), eps) if isinstance(eps, Tensor) else delta.clamp(-eps, eps)
    elif norm == "l2":
        delta = delta * (eps / sample_norm(delta).clamp_min(1e-12)).clamp_max(1.0)
    else:
        raise ValueError(f"norm {norm!r} is not one of linf, l2")
    return (pixels + delta).clamp(0.0, 1.0)


def random_in_ball(
    pixels: Tensor, *, eps: float | Tensor, norm: str, generator: torch.Generator | None = None
) -> Tensor:
    """A point drawn uniformly from the eps-ball around each sample, clipped to [0, 1].

    [B, ...] in [0, 1] -> the same; ``eps``: one for all or [B]. The noise of noisy replay and the random start of PGD.
    Raises ValueError for an unknown norm.
    """
    if norm == "linf" and isinstance(eps, Tensor):
        noise = torch.empty_like(pixels).uniform_(-1.0, 1.0, generator=generator) * per_sample(eps, pixels)
    elif norm == "linf" and not isinstance(eps, Tensor):
        noise = torch.empty_like(pixels).uniform_(-eps, eps, generator=generator)
    elif norm == "l2":
        direction = torch.empty_like(pixels).normal_(generator=generator)
        # the radius' power of 1/d makes the draw uniform in the ball's volume
        radius = per_sample(torch.empty(len(pixels), device=pixels.device).uniform_(generator=generator), pixels)
        size = per_sample(eps, pixels) if isinstance(eps, Tensor) else eps
        share = radius ** (1 / math.prod(pixels.shape[1:]))
        noise = (direction * (size * share / sample_norm(direction))).to(pixels.dtype)
    else:
        raise ValueError(f"norm {norm!r} is not one of linf, l2")
    return (pixels + noise).clamp(0.0, 1.0)


def pgd(
    logits_fn: LogitsFn,
    pixels: Tensor,
    targets: Tensor,
    *,
    eps: float | Tensor,
    step_size: float | None,
    steps: int,
    norm: str = "linf",
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
    loss_fn: Callable[[Tensor, Tensor], Tensor] = margin,
    gradient_scale: float = 1.0,
    images_at_once: int | None = None,
    stop_after: int | None = None,
    static_shapes: bool = False,
) -> AttackResult:
    """Untargeted projected gradient descent (Madry et al. 2018, arXiv 1706.06083): ``steps`` forward passes,
    each with a backward pass to the pixels alone.

    Args:
        logits_fn: pixels [B, C, H, W] -> logits [B, K]; a model in `frozen_eval`.
        pixels: clean images in [0, 1].
        targets: B rows of what ``loss_fn`` takes beside the logits; for the default, the labels ([B], class indices).
        eps: radius of the ball, one for all or [B]. step_size: length of a step; None: `default_step_size` of each eps.
            Both on pixels in [0, 1].
        generator: of the random start, drawn uniformly from the ball unless ``start`` is given.
        loss_fn: logits [B, K], targets -> [B], what is maximised. Default: `margin`, whose steps are cross-entropy's.
        gradient_scale: factor on the loss; the steps do not depend on it, but in fp16 it keeps small
            gradients from underflowing.
        images_at_once: attack the batch in equal parts of at most this many, one after the other; None: all at once.
            The same result, to rounding, since no sample depends on another; faster on a CPU whose cache holds the
            activations of a part.
        stop_after: a sample is left alone this many steps after a forward pass has misclassified it, the step of that
            pass included: a weaker attack of fewer passes, for training (after Zhang et al. 2020, arXiv 2002.11242,
            algorithm 1, which counts the passes that misclassify it; a sample seldom comes back). ``targets`` must be
            labels. None: never.
        static_shapes: with ``stop_after``, compute all samples to the end all the same: the same result, for passes
            whose number and shape depend on no sample.

    Raises:
        ValueError: for an unknown norm.
    """
    adversarial = random_in_ball(pixels, eps=eps, norm=norm, generator=generator) if start is None else start
    if images_at_once is not None and images_at_once < len(pixels):
        count = math.ceil(len(pixels) / images_at_once)
        radii = eps.tensor_split(count) if isinstance(eps, Tensor) else [eps] * count
        parts = zip(*(x.tensor_split(count) for x in (pixels, targets, adversarial)), radii, strict=True)
        found = [
            pgd(
                logits_fn, some, of_some, eps=of_these, step_size=step_size, steps=steps, norm=norm, start=begin,
                loss_fn=loss_fn, gradient_scale=gradient_scale, stop_after=stop_after, static_shapes=static_shapes,
            )
            for some, of_some, begin, of_these in parts
        ]  # fmt: skip
        return AttackResult(*map(torch.cat, zip(*found, strict=True)))

    dims = tuple(range(1, pixels.dim()))
    radius = per_sample(eps, pixels) if isinstance(eps, Tensor) else eps
    length: float | Tensor = default_step_size(radius, steps) if step_size is None else step_size
    if norm == "linf":  # what the ball has in common with [0, 1] is a box
        low, high = (pixels - radius).clamp_min(0.0), (pixels + radius).clamp_max(1.0)

    def ascend(which: slice | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step of these samples: where it ends, which had no gradient, the logits before it."""
        here = adversarial[which].detach().requires_grad_(True)
        with torch.enable_grad():
            logits = logits_fn(here)
            loss = loss_fn(logits, targets[which]).sum() * gradient_scale
        (gradient,) = torch.autograd.grad(loss, here)
        # a gradient may overflow, scaled in half precision above all: only its direction matters; NaN is no direction
        gradient = gradient.nan_to_num(nan=0.0)
        size = length[which] if isinstance(length, Tensor) else length
        with torch.no_grad():
            zero = ~gradient.any(dim=dims)
            if norm == "linf":
                signs = gradient.sign()
                moved = here + signs * size if isinstance(size, Tensor) else here.add(signs, alpha=size)
                moved = moved.clamp_(low[which], high[which])
            else:
                # a half-precision gradient's norm may overflow, and so may any one's squares, or vanish, unless scaled
                direction = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
                direction = direction / direction.abs().amax(dim=dims, keepdim=True).clamp_min(TINY)
                step = size * direction / sample_norm(direction).clamp_min(1e-30)
                ball = eps[which] if isinstance(eps, Tensor) else eps
                moved = project(here + step.to(here.dtype), pixels[which], eps=ball, norm=norm)
        return moved, zero, logits.detach()

    zero_gradients = torch.zeros(len(pixels), device=pixels.device)
    if stop_after is None:
        for _ in range(steps):
            adversarial, zero, _ = ascend(slice(None))
            zero_gradients += zero
        return AttackResult(adversarial.detach(), zero_gradients, torch.full_like(zero_gradients, steps))

    adversarial = adversarial.detach().clone()
    taken = torch.zeros_like(zero_gradients)
    left = torch.full_like(zero_gradients, steps)  # steps that a sample may still take
    where = torch.arange(len(pixels), device=pixels.device)  # the samples that are computed
    for _ in range(steps):
        moved, zero, logits = ascend(where)
        taken[where] += 1
        wrong = logits.argmax(dim=1) != targets[where]
        may = torch.where(wrong, left[where].clamp_max(stop_after), left[where])
        going = per_sample(may > 0, moved)
        adversarial[where] = torch.where(going, moved, adversarial[where])
        zero_gradients[where] += zero & (may > 0)
        left[where] = may - 1
        if not static_shapes:
            where = where[left[where] > 0]
            if not len(where):
                break
    return AttackResult(adversarial, zero_gradients, taken)
