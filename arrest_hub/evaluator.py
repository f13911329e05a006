"""The engine of an evaluation: images, batch by batch and stage by stage, on any number of processes.

A stage is one attack (or one part of AutoAttack) on a list of images. Its batches are cut from that list in order, so
they do not depend on the number of processes, and neither does what a batch gives: processes share the batches, each
batch's outcome goes into the journal, and at the end of the stage everybody knows every outcome.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from arrest_hub.attacks import LogitsFn, frozen_eval
from arrest_hub.autoattack import collect_warnings
from arrest_hub.data import to_pixels
from arrest_hub.errors import ArrestError, ConfigError
from arrest_hub.journal import Entry, Journal
from arrest_hub.out_of_memory import full_memory_told
from arrest_hub.processes import all_arrive
from arrest_hub.progress import progress_bar
from arrest_hub.tf32 import tf32
from arrest_hub.validation import arithmetic


class Images(Protocol):
    """Images by position: ``__getitems__`` gives dicts of "pixels" (uint8, or float in [0, 1]), "label", "index"."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int, /) -> dict[str, Any]: ...


class TensorImages(Dataset[dict[str, Any]]):
    """Images given as tensors: pixels [N, C, H, W], uint8 or float in [0, 1], and labels [N].

    Raises:
        ConfigError: wrong shapes, types or values, naming them.
    """

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        if pixels.ndim != 4 or labels.ndim != 1 or len(pixels) != len(labels) or not len(pixels):
            raise ConfigError(
                f"images of shape {tuple(pixels.shape)} with labels of shape {tuple(labels.shape)}: give pixels "
                "[N, C, H, W] and labels [N] with N at least 1."
            )
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise ConfigError(f"labels of type {labels.dtype}: give class numbers as integers.")
        if pixels.dtype != torch.uint8:
            if not pixels.is_floating_point():
                raise ConfigError(f"pixels of type {pixels.dtype}: give uint8, or floats in [0, 1].")
            low, high = (float(value) for value in pixels.detach().aminmax())
            if not pixels.isfinite().all():
                raise ConfigError("some pixels are not finite: give values in [0, 1].")
            if not (low >= 0.0 and high <= 1.0):
                raise ConfigError(
                    f"pixels between {low:g} and {high:g}: give them in [0, 1]. If they are normalised, undo it and "
                    "put the normalisation into the model."
                )
            pixels = pixels.float()
        self.pixels, self.labels = pixels.detach().cpu(), labels.long().cpu()

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, position: int, /) -> dict[str, Any]:
        return {"pixels": self.pixels[position], "label": int(self.labels[position]), "index": position}


@dataclass
class Attacked:
    """What an attack made of a batch: adversarial pixels [B, C, H, W], and JSON values for the journal."""

    adversarial: Tensor
    extra: Entry


AttackFn = Callable[[Tensor, Tensor, int], Attacked]
"""(pixels [B, C, H, W], labels [B], number of the batch) -> Attacked."""


@dataclass
class CleanOutcome:
    """``index``, ``label``, ``prediction``: int64 [N]. ``images_per_second`` leaves the first batch out, which warms
    up, where there are others."""

    index: np.ndarray
    label: np.ndarray
    prediction: np.ndarray
    num_classes: int
    seconds: float
    images_per_second: float


@dataclass
class StageOutcome:
    """``broken``: positions of the images that were broken, ascending. ``seconds``: of all batches, divided by the
    processes that shared them. ``largest``: the largest perturbation of a broken image, in the attack's norm."""

    broken: list[int]
    attacked: int
    seconds: float
    largest: float
    entries: list[Entry]


def as_logits(output: Any) -> Tensor:
    """The logits [B, K] in what a classifier returns: a tensor, or an object with ``logits``.

    Raises:
        ConfigError: neither.
    """
    logits = getattr(output, "logits", output)
    if isinstance(logits, Tensor) and logits.ndim == 2:
        return logits
    shape = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(output).__name__
    raise ConfigError(f"the model returned {shape}: it must map pixels [B, C, H, W] in [0, 1] to logits [B, K].")


def logits_function(
    model: nn.Module,
    *,
    precision: str = "fp32",
    channels_last: bool = False,
    device: torch.device,
    on_pass: Callable[[int], None] | None = None,
) -> LogitsFn:
    """Pixels -> logits in float32, computed in ``precision`` (fp32, tf32 or bf16); ``on_pass`` hears of every pass."""
    if channels_last:
        model.to(memory_format=torch.channels_last)

    def classify(pixels: Tensor) -> Tensor:
        if on_pass is not None:
            on_pass(len(pixels))
        if not pixels.requires_grad:
            pixels = pixels.clone()  # a network may normalise in place; where a gradient is wanted, autograd refuses it
        if channels_last:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return as_logits(model(pixels)).float()

    return classify


def perturbation_size(difference: Tensor, norm: str) -> Tensor:
    """Norm of each sample: [B, ...] -> [B]."""
    return torch.linalg.vector_norm(difference.flatten(1), {"linf": float("inf"), "l2": 2, "l1": 1}[norm], dim=1)


class Evaluator:
    """Runs stages for one model on one list of images.

    ``model`` maps pixels in [0, 1] to logits and is on the accelerator's device; ``labels`` are model outputs [N].
    Verdicts are those of `classify`, in ``precision``. Attacks may follow `search`, in ``attack_precision`` or of
    ``search_model``, the same network to rounding, while `searching`; by default both are one function.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Images,
        accelerator: Accelerator,
        journal: Journal,
        *,
        batch_size: int,
        num_workers: int = 0,
        precision: str = "fp32",
        attack_precision: str | None = None,
        search_model: nn.Module | None = None,
        channels_last: bool = False,
        norm: str = "linf",
        name: str = "",
    ) -> None:
        self.model, self.images, self.accelerator, self.journal = model, images, accelerator, journal
        self.batch_size, self.num_workers, self.precision, self.norm = batch_size, num_workers, precision, norm
        self.name = f"{name} " if name else ""
        self._passes = 0
        self._on_pass: Callable[[], None] = lambda: None
        options = {"channels_last": channels_last, "device": accelerator.device, "on_pass": self._tick}
        self.classify = self.search = logits_function(model, precision=precision, **options)
        self.attack_precision, self.search_model = attack_precision or precision, search_model
        if search_model is not None or self.attack_precision != precision:
            follow = model if search_model is None else search_model
            self.search = logits_function(follow, precision=self.attack_precision, **options)

    def _tick(self, count: int) -> None:
        self._passes += count
        self._on_pass()

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Frozen model, chosen arithmetic; a full GPU becomes a clear error. Every stage runs within this context."""
        cure = "a smaller --batch-size needs less (start anew with it: AutoAttack's draws depend on it)."
        told = full_memory_told(f"{self.batch_size} images at once are too many, and {cure}")
        with told, frozen_eval(self.model), arithmetic(self.precision):
            yield

    @contextmanager
    def searching(self) -> Iterator[None]:
        """Within `ready`: the arithmetic of `search`, for its gradients too."""
        with tf32(self.attack_precision == "tf32"):
            yield

    def batches(self, positions: Sequence[int], mine: Sequence[int]) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """(number, pixels, labels, index) of the batches ``mine``, on the device; images are read ahead."""
        size = self.batch_size
        chosen = [list(positions[number * size : (number + 1) * size]) for number in mine]
        loader: DataLoader[Any] = DataLoader(
            self.images,  # type: ignore[arg-type]
            batch_sampler=chosen,
            num_workers=min(self.num_workers, len(chosen)),
            pin_memory=self.accelerator.device.type == "cuda",
            generator=torch.Generator(),
        )
        for number, batch in zip(mine, _same_size(loader), strict=True):
            pixels, labels = (
                batch[name].to(self.accelerator.device, non_blocking=self.accelerator.non_blocking)
                for name in ("pixels", "label")
            )
            yield number, to_pixels(pixels), labels, batch["index"]

    def _share(self, stage: str, count: int) -> list[int]:
        """The batches of a stage that are this process's to do."""
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        return [number for number in range(rank, count, processes) if (stage, number) not in self.journal.entries]

    def clean(self, stage: str = "clean") -> CleanOutcome:
        """Classify every image.

        Raises:
            ArrestError: logits that are not finite, labels that the model has no output for.
        """
        positions = range(len(self.images))
        count = -(-len(positions) // self.batch_size)
        mine = self._share(stage, count)
        with (
            all_arrive(self.accelerator),
            self.ready(),
            self._bar(len(positions), count, mine, f"{self.name}clean") as bar,
            torch.no_grad(),
        ):
            right = done = 0
            for number, pixels, labels, index in self.batches(positions, mine):
                started = time.perf_counter()
                logits = self.classify(pixels)
                prediction = logits.argmax(dim=1)
                _check_logits(logits, labels, index)
                entry = {
                    "index": index.tolist(), "label": labels.tolist(), "prediction": prediction.tolist(),
                    "classes": logits.shape[1],
                }  # fmt: skip
                self._finish(stage, number, entry, started)
                right, done = right + int((prediction == labels).sum()), done + len(labels)
                bar.update(len(labels))
                bar.set_postfix_str(f"clean {100 * right / done:.1f} %")
        entries = self.journal.gather(stage, count)
        columns = [np.array([x for entry in entries for x in entry[key]], dtype=np.int64)
                   for key in ("index", "label", "prediction")]  # fmt: skip
        timed = entries[1:] or entries
        speed = sum(len(entry["label"]) for entry in timed) / max(_seconds(timed), 1e-9)
        return CleanOutcome(columns[0], columns[1], columns[2], entries[0]["classes"], _seconds(entries), speed)

    def attack(
        self, stage: str, positions: Sequence[int], attack: AttackFn, *, title: str, passes: int, of: int
    ) -> StageOutcome:
        """Attack the images at ``positions`` and see which are then classified wrongly.

        ``passes``: about how often the network sees an image that stands to the end; ``of``: the number of images that
        the accuracy on the progress bar is a share of.
        """
        count = -(-len(positions) // self.batch_size)
        mine = self._share(stage, count)
        with (
            all_arrive(self.accelerator),
            self.ready(),
            self._bar(len(positions), count, mine, f"{self.name}{title}") as bar,
        ):
            known = [entry for number in range(count) if (entry := self.journal.entries.get((stage, number)))]
            done, broken = sum(entry["n"] for entry in known), sum(len(entry["broken"]) for entry in known)
            own_total = max(1, done + sum(min(self.batch_size, len(positions) - n * self.batch_size) for n in mine))

            def show() -> None:
                # of this process's share; exact where there is one process
                standing = len(positions) * (1 - broken / own_total)
                bar.set_postfix_str(f"robust {100 * standing / of:.1f} %", refresh=False)

            show()
            for number, pixels, labels, index in self.batches(positions, mine):
                started, size = time.perf_counter(), len(labels)
                self._passes, shown = 0, bar.n

                def advance(start: float = shown, size: int = size) -> None:
                    share = min(0.99, self._passes / (passes * size))
                    bar.update(start + share * size - bar.n)

                self._on_pass = advance
                try:
                    with collect_warnings() as warnings:
                        attacked = attack(pixels, labels, number)
                    with torch.no_grad():
                        logits = self.classify(attacked.adversarial)
                finally:
                    self._on_pass = lambda: None
                _check_logits(logits, labels, index, f" under {title}")
                wrong = logits.argmax(dim=1) != labels
                largest = perturbation_size(attacked.adversarial - pixels, self.norm)[wrong]
                chosen = positions[number * self.batch_size : (number + 1) * self.batch_size]
                entry = {
                    "n": size,
                    "broken": [int(chosen[i]) for i in wrong.nonzero().squeeze(1).tolist()],
                    "largest": float(largest.max()) if len(largest) else 0.0,
                    "inside": bool(((attacked.adversarial >= 0) & (attacked.adversarial <= 1)).all()),
                    "warnings": sorted(set(warnings)),
                    **attacked.extra,
                }
                self._finish(stage, number, entry, started)
                broken += int(wrong.sum())
                bar.update(shown + size - bar.n)
                show()
        entries = self.journal.gather(stage, count)
        return StageOutcome(
            broken=sorted(position for entry in entries for position in entry["broken"]),
            attacked=len(positions),
            seconds=_seconds(entries),
            largest=max((entry["largest"] for entry in entries), default=0.0),
            entries=entries,
        )

    def _finish(self, stage: str, number: int, entry: Entry, started: float) -> None:
        entry["seconds"] = time.perf_counter() - started
        entry["processes"] = self.accelerator.num_processes
        self.journal.add(stage, number, entry)

    def _bar(self, total: int, count: int, mine: Sequence[int], description: str) -> Any:
        """Images of this process's share, with what a resumed run has done already."""
        size = self.batch_size
        own = sum(min(size, total - number * size) for number in mine)
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        share = sum(min(size, total - number * size) for number in range(rank, count, processes))
        return progress_bar(share, share - own, description, self.accelerator, fractional=True)


def _same_size(loader: DataLoader[Any]) -> Iterator[Any]:
    try:
        yield from loader
    except RuntimeError as error:
        if "equal size" not in str(error):
            raise
        raise ConfigError(
            "the images have different sizes, and a network given as an object does not say which it wants: give "
            "image_size."
        ) from error


def _check_logits(logits: Tensor, labels: Tensor, index: Tensor, when: str = "") -> None:
    if not logits.isfinite().all():
        bad = int((~logits.isfinite().all(dim=1)).nonzero()[0])
        raise ArrestError(
            f"the model's logits for image {int(index[bad])}{when} are not finite ({logits[bad].tolist()[:3]}, ...): "
            "its weights may be damaged or diverged, or the precision too low. Load them again, or give --precision "
            "fp32."
        )
    wrong = (labels < 0) | (labels >= logits.shape[1])
    if wrong.any():
        bad = int(wrong.nonzero()[0])
        raise ArrestError(
            f"image {int(index[bad])} has label {int(labels[bad])} and the model {logits.shape[1]} outputs "
            f"(0 to {logits.shape[1] - 1}): the model was made for other classes. Give a model for this dataset, or "
            "other labels (--label-column)."
        )


def _seconds(entries: Sequence[Entry]) -> float:
    return sum(entry["seconds"] / entry["processes"] for entry in entries)
