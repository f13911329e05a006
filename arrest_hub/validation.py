"""Clean and robust accuracy: counts over a loader, on any number of processes."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from arrest_hub.attacks import frozen_eval, pgd
from arrest_hub.data import to_pixels
from arrest_hub.progress import progress_bar
from arrest_hub.results import Result, pgd_parameters
from arrest_hub.seeding import derive_seed
from arrest_hub.tf32 import tf32


class Counts(NamedTuple):
    """How many of ``n`` images were classified correctly, clean and under attack, and how long each took (seconds)."""

    n: int
    clean: int
    robust: int
    clean_seconds: float
    robust_seconds: float


class PgdSettings(NamedTuple):
    """PGD for an evaluation: radius and step length on pixels in [0, 1]; the rest see `attacks.pgd`."""

    norm: str
    eps: float
    step_size: float
    steps: int
    images_at_once: int | None = None
    gradient_scale: float = 1.0


def count_correct(
    model: nn.Module,
    loader: Iterable[dict[str, Any]],
    accelerator: Accelerator,
    settings: PgdSettings | None,
    *,
    seed: int,
    description: str,
    total: int | None,
    nested: bool = False,
    after_batch: Callable[[], None] | None = None,
    fill_to: int | None = None,
) -> Counts:
    """Count correct predictions, clean and (given ``settings``) under PGD from one random start.

    ``model`` maps pixels in [0, 1] to `BackboneOutput`; ``loader`` must be prepared by ``accelerator`` and yields
    "pixels" (uint8), "label" and "index". An image that is wrong when clean counts as wrong under attack, since the
    clean image is inside the ball; it is not attacked. The random start depends on the seed and on the images of a
    batch alone, so that the figure does not depend on the number of processes (in l2 but for rounding; of a stream but
    for its last batches, which Accelerate shares out over the processes). ``nested``: see `progress_bar`.
    ``after_batch`` may raise to break off. ``fill_to``: attack all images of a batch, also those that are wrong when
    clean, so that every process makes the same passes, and fill every batch up to so many; the figures are the same but
    for the attack's start.

    Logits that are not finite are no correct prediction.
    """
    generator = torch.Generator(device=accelerator.device)
    n = clean = robust = 0
    clean_seconds = robust_seconds = 0.0
    with frozen_eval(model), progress_bar(total, 0, description, accelerator, nested=nested) as bar:
        for batch in loader:
            pixels, labels = to_pixels(batch["pixels"]), batch["label"]
            count = len(labels)
            if fill_to is not None and count < fill_to:
                repeated = torch.arange(fill_to, device=labels.device) % count
                pixels, labels = pixels[repeated], labels[repeated]
            started = time.perf_counter()
            with torch.no_grad(), accelerator.autocast():
                clean_correct = _correct(model(pixels).logits, labels)
            robust_correct = torch.zeros_like(clean_correct)
            # waits for the device, so the times below are true
            attacked = (clean_correct | (fill_to is not None)).nonzero().squeeze(1)
            clean_seconds += time.perf_counter() - started
            started = time.perf_counter()
            if settings is not None and len(attacked):
                generator.manual_seed(derive_seed(seed, "evaluate", int(batch["index"][0])))
                with accelerator.autocast():
                    adversarial = pgd(
                        lambda x: model(x).logits,
                        pixels[attacked],
                        labels[attacked],
                        norm=settings.norm,
                        eps=settings.eps,
                        step_size=settings.step_size,
                        steps=settings.steps,
                        images_at_once=settings.images_at_once,
                        gradient_scale=settings.gradient_scale,
                        generator=generator,
                    ).adversarial
                    with torch.no_grad():
                        robust_correct[attacked] = _correct(model(adversarial).logits, labels[attacked])
                robust_correct &= clean_correct
            counted = clean_correct[:count], robust_correct[:count]
            gathered_clean, gathered_robust = accelerator.gather_for_metrics(counted)
            n += len(gathered_clean)
            clean += int(gathered_clean.sum())
            robust += int(gathered_robust.sum())
            robust_seconds += time.perf_counter() - started
            bar.update(len(gathered_clean))
            shown = {"clean": clean} if settings is None else {"clean": clean, "robust": robust}
            bar.set_postfix({name: f"{100 * count / n:.1f} %" for name, count in shown.items()})
            if after_batch is not None:
                after_batch()
    return Counts(n, clean, robust, clean_seconds, robust_seconds)


def _correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Which predictions are right: [B, K], [B] -> bool [B]; a row with NaN or infinity is not, whatever its argmax."""
    return (logits.argmax(dim=1) == labels) & logits.isfinite().all(dim=1)


_measuring = threading.RLock()


def _nobody_measures() -> None:
    """In a forked process the thread that held the lock does not exist."""
    global _measuring
    _measuring = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_nobody_measures)


@contextlib.contextmanager
def arithmetic(precision: str = "fp32") -> Iterator[None]:
    """TF32 on for "tf32" and off for anything else, and cuDNN deterministic, so that an evaluation can be repeated; put
    back afterwards. Figures are reported in fp32 without TF32. These switches are the process's: threads wait for each
    other here (so a network's own forward must not wait for another thread that measures)."""
    cudnn = torch.backends.cudnn
    with _measuring:
        before = cudnn.deterministic, cudnn.benchmark
        cudnn.deterministic, cudnn.benchmark = True, False
        try:
            with tf32(precision == "tf32"):
                yield
        finally:
            cudnn.deterministic, cudnn.benchmark = before


def to_results(counts: Counts, settings: PgdSettings, *, eps: str, dataset: str, split: str, seed: int) -> list[Result]:
    """Counts as the two entries of `results.json`: clean accuracy and accuracy under PGD."""
    row = partial(Result, n=counts.n, dataset=dataset, split=split, seed=seed)
    return [
        row("clean_accuracy", None, None, None, counts.clean, seconds=counts.clean_seconds),
        row(
            "robust_accuracy",
            f"pgd-{settings.steps}",
            settings.norm,
            eps,
            counts.robust,
            seconds=counts.robust_seconds,
            attack_parameters=pgd_parameters(settings.steps, settings.step_size),
        ),
    ]
