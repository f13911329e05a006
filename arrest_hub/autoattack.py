"""AutoAttack (Croce and Hein 2020, arXiv 2003.01690) part by part, through the `pyautoattack` package.

The package runs a whole evaluation in one process; here its parts are called batch by batch, with the parameters of its
standard version, so that an evaluation can be shared among processes and go on after an interruption. A batch gives
what the package gives for the same batch: each part seeds itself anew for every batch.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
from pyautoattack import AutoAttack
from pyautoattack import checks as package_checks
from torch import Tensor

from arrest_hub.attacks import LogitsFn

NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
LIBRARY = "pyautoattack"


def library() -> str:
    """``pyautoattack 0.2.0``."""
    return f"{LIBRARY} {version(LIBRARY)}"


def standard_parts(num_classes: int) -> tuple[list[str], dict[str, str]]:
    """The parts of the standard version that are valid for so many classes, and why the others are not run.

    The difference-of-logits-ratio loss needs three logits, its targeted form four. With three classes the untargeted
    form takes the targeted one's place.
    """
    if num_classes >= 4:
        return ["apgd-ce", "apgd-t", "fab-t", "square"], {}
    reason = f"the targeted DLR loss needs four classes and there are {num_classes}"
    if num_classes == 3:
        return ["apgd-ce", "apgd-dlr", "fab-t", "square"], {"apgd-t": reason + "; apgd-dlr is run instead"}
    return ["apgd-ce", "fab-t", "square"], {"apgd-t": reason}


def part_problem(part: str, num_classes: int) -> str | None:
    """Why a part cannot be run on a model with so many classes, or None."""
    needed = {"apgd-t": 4, "apgd-dlr": 3}.get(part, 2)
    if num_classes >= needed:
        return None
    return (
        f"--attacks {part} needs at least {needed} classes and the model has {num_classes}: give autoattack, which "
        "runs what is valid, or apgd-ce, fab-t, square."
    )


class AutoAttackParts:
    """The parts of AutoAttack's standard version, for a model of ``num_classes`` classes.

    Args:
        logits_fn: pixels [B, C, H, W] in [0, 1] -> logits [B, K], parameters frozen.
        norm: linf, l2 or l1. eps: radius on pixels in [0, 1]. seed: as in the package.
    """

    def __init__(
        self, logits_fn: LogitsFn, *, norm: str, eps: float, seed: int, num_classes: int, device: torch.device | str
    ) -> None:
        self.seed, self.device = seed, torch.device(device)
        suite = AutoAttack(logits_fn, norm=NORMS[norm], eps=eps, seed=seed, device=self.device, version="standard")
        suite.apgd_targeted.n_target_classes = min(suite.apgd_targeted.n_target_classes, num_classes - 1)
        suite.fab.n_target_classes = min(suite.fab.n_target_classes, num_classes - 1)
        self.suite = suite

    def perturb(self, part: str, pixels: Tensor, labels: Tensor) -> Tensor:
        """Adversarial examples, [B, C, H, W] in [0, 1], as the package makes them for this batch.

        FAB looks for the smallest perturbation and may return one outside the ball only for an image it did not break.
        Torch's global random state is left as it was. Raises ValueError for an unknown part.
        """
        attack = self._select(part)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            attack.seed = self.seed
            # the package runs its parts without gradients and lets them switch them on
            with torch.no_grad():
                return attack.perturb(pixels, labels)

    def _select(self, part: str) -> Any:
        suite = self.suite
        if part in ("apgd-ce", "apgd-dlr"):
            suite.apgd.loss = part.removeprefix("apgd-")
            return suite.apgd
        if part == "apgd-t":
            return suite.apgd_targeted
        if part in ("fab", "fab-t"):
            suite.fab.targeted = part == "fab-t"
            return suite.fab
        if part == "square":
            return suite.square
        raise ValueError(f"part {part!r} is not one of AutoAttack's")

    def parameters(self, part: str) -> dict[str, Any]:
        """What `results.json` says about a part: iterations or queries, restarts, target classes."""
        attack = self._select(part)
        if part == "square":
            return {"queries": attack.n_queries, "restarts": attack.n_restarts, "p_init": attack.p_init}
        # APGD for l1 changes n_iter while it works
        values = {"iterations": getattr(attack, "n_iter_orig", attack.n_iter), "restarts": attack.n_restarts}
        if part in ("apgd-t", "fab-t"):
            values["target_classes"] = attack.n_target_classes
        if part.startswith("apgd"):
            values["rho"] = attack.thr_decr
            values["loss"] = {"apgd-ce": "cross-entropy", "apgd-dlr": "dlr", "apgd-t": "targeted dlr"}[part]
            if attack.use_largereps:
                values["eps_schedule"] = [3, 2, 1]
        return values

    def passes(self, part: str) -> int:
        """About how many times the network sees each image that stands to the end; for the progress bar."""
        attack = self._select(part)
        if part == "square":
            return attack.n_restarts * (attack.n_queries + 1)
        if part == "fab":
            return attack.n_restarts * 2 * attack.n_iter
        targets = attack.n_target_classes if part.endswith("-t") else 1
        return self.parameters(part)["iterations"] * attack.n_restarts * targets * (2 if part == "fab-t" else 1)


@contextmanager
def collect_warnings() -> Iterator[list[str]]:
    """What the package warns of meanwhile goes into the list instead of onto the screen."""
    logger = logging.getLogger("auto-attack")
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    before = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.propagate = before


def model_flags(logits_fn: LogitsFn, pixels: Tensor, labels: Tensor) -> dict[str, list[str]]:
    """The package's checks of the model itself on one batch: {"randomized", "probabilities", "dynamic"} -> warnings."""
    logger = logging.getLogger("auto-attack")
    probes: dict[str, Callable[[], Any]] = {
        "randomized": lambda: package_checks.check_randomized(logits_fn, pixels, labels, bs=len(pixels), logger=logger),
        "probabilities": lambda: package_checks.check_range_output(logits_fn, pixels, logger=logger),
        "dynamic": lambda: package_checks.check_dynamic(logits_fn, pixels, False, logger=logger),
    }
    found = {}
    tracer = sys.gettrace()
    package_checks.funcs.update(dict.fromkeys(package_checks.funcs, 0))  # counts of earlier models
    with torch.no_grad():
        for name, probe in probes.items():
            with collect_warnings() as messages:
                probe()
            found[name] = messages
    sys.settrace(tracer)  # the check for dynamic defences takes a debugger's away
    return found


def square_flag(correct: dict[str, int], n: int) -> list[str]:
    """The package's check of Square: ``correct`` counts what stands after each part, in the order they ran.

    It warns when Square alone lowers the accuracy by more than 0.2 points.
    """
    with collect_warnings() as messages:
        package_checks.check_square_sr(
            {part: count / n for part, count in correct.items()}, logger=logging.getLogger("auto-attack")
        )
    return messages
