"""How many steps the attack of training takes, and how long they are."""

from __future__ import annotations

from typing import Any


def default_step_size(eps: Any, steps: int) -> Any:
    """2.5 eps / steps: long enough to reach the ball's border from anywhere in it (Madry et al. 2018, 1706.06083).

    ``eps``: a float, or a tensor of them. Of no steps any length will do.
    """
    return 2.5 * eps / max(steps, 1)


def attack_steps_at(done: float, first: int, last: int) -> int:
    """``first`` steps at the start of training, ``last`` at its end, and each number between for an equal share of it.

    A weak attack is enough while the network is not robust yet (Cai et al. 2018, arXiv 1805.04807).

    Args:
        done: of the training, from 0 (nothing) to 1.
        first: at most ``last``.
    """
    return min(last, first + int(done * (last - first + 1)))
