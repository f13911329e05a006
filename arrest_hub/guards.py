"""What stops a run, or warns, before days are spent on a network that learns nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from arrest_hub.sharding import local

# the parts of an objective that must be finite, in the order in which one makes the next infinite
TERMS = {
    "drift": "drift of the student's representation",
    "distance": "distance term",
    "cross_entropy": "cross-entropy",
    "loss": "loss",
}
SHOWN = 8
REPLAYED = 0.9
"""Share of an epoch's images above which replay leaves too few to be attacked."""


def first_not_finite(
    values: Mapping[str, Sequence[Tensor]], steps: Sequence[int], indices: Sequence[Tensor]
) -> str | None:
    """Where a term first was NaN or infinite, as in ``the cross-entropy of samples 5, 18 is nan at step 37``.

    ``values``: by term (names of `TERMS`; others are ignored), one tensor for each batch, [B] or a scalar; ``steps``
    and ``indices`` ([B], positions in the training split): of the same batches. None when all are finite.
    """
    terms = {name: values[name] for name in TERMS if name in values}
    flags = [tensor.isfinite().all() for batches in terms.values() for tensor in batches]
    if not flags or bool(torch.stack(flags).all()):  # the one wait for the device
        return None
    for number, (step, index) in enumerate(zip(steps, indices, strict=True)):
        for name, batches in terms.items():
            bad = ~batches[number].isfinite()
            if not bad.any():
                continue
            value = float(batches[number][bad][0])
            samples = index[bad].tolist() if len(bad) == len(index) else []
            shown = ", ".join(map(str, samples[:SHOWN])) + (", ..." if len(samples) > SHOWN else "")
            whose = f" of sample{'s' * (len(samples) != 1)} {shown} (positions in the training split)" * bool(samples)
            return f"the {TERMS[name]}{whose} is {value} at step {step}"
    raise AssertionError("a value that was not finite is gone")


def not_finite_tensor(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor that holds a NaN or an infinite number; None when there is none."""
    own = ((name, local(tensor.detach())) for name, tensor in tensors if tensor.is_floating_point())
    named = [(name, tensor) for name, tensor in own if tensor.numel()]  # of a sharded one a process may have nothing
    # one number for the device to be waited for, in few operations: NaN is the largest
    if bool(torch.nn.utils.get_total_norm([tensor for _, tensor in named], math.inf).isfinite()):
        return None
    return next(name for name, tensor in named if not tensor.isfinite().all())


def at_chance(correct: int, n: int, num_classes: int) -> bool:
    """Whether ``correct`` of ``n`` is no better than guessing among equally frequent classes: at most two standard
    deviations above. Never for so few images that guessing gets fewer than ten of them right."""
    expected = n / num_classes
    return expected >= 10 and correct <= expected + 2 * math.sqrt(expected * (1 - 1 / num_classes))


def collapse_warning(
    accuracy: float, first: float | None, num_classes: int, standard: bool = False, standard_epochs: int = 0
) -> str:
    """What to say of a clean ``accuracy`` at chance after an epoch; ``first``: what it was at the run's first steps,
    if that is known; ``standard``: in the clean phase; ``standard_epochs``: how long that one was."""
    if standard:
        cause = "It needs more of --standard-epochs, or another --standard-lr."
    elif first is not None and first <= 1.5 / num_classes and standard_epochs:
        cause = (
            f"It was so from the first step: the clean training before it ({standard_epochs} of --standard-epochs) was "
            "too short, or at a learning rate that does not suit (--standard-lr)."
        )
    elif first is not None and first <= 1.5 / num_classes:
        cause = (
            "It was so from the first step: the network was not trained on these classes (add --standard-epochs), "
            "or they are in another order than the dataset's (see --label-match)."
        )
    else:
        cause = (
            "The likely cause is a learning rate that is too high: start again with a smaller --lr, with "
            "--warmup-epochs or --clip-grad 1, or with a smaller --eps."
        )
    what = "has learnt nothing yet" if standard else "has collapsed"
    return (
        f"warning: the network {what}: {100 * accuracy:.1f} % clean accuracy over the last epoch is what "
        f"guessing among {num_classes} classes gives. {cause}"
    )


def replay_warning(share: float, threshold: float | None) -> str:
    """What to say of an epoch in which this share of the images, beyond `REPLAYED`, was replayed and not attacked."""
    return (
        f"warning: {100 * share:.0f} % of the images of the last epoch were replayed with noise, so that hardly any "
        f"was attacked: their drift is above --replay-threshold {threshold:g}. If it stays so, the network will not be "
        "robust: start again with a higher threshold, a smaller --lr or a larger --rgkd-weight."
    )
