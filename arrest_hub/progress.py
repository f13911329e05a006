"""What a run says while it works: averages over logging intervals, log.jsonl, the progress bar, trackers."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from arrest_hub.files import write_whole
from arrest_hub.guards import first_not_finite
from arrest_hub.processes import main_only

T = TypeVar("T")

QUANTILES = {"drift": (0.5, 0.9)}
FRACTIONAL = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
# per-sample parts of an objective -> the names they are logged under
LOG_NAMES = {
    "adversarial_correct": "adversarial_accuracy",
    "clean_correct": "clean_accuracy",
    "replayed": "replay_rate",
}


class Meter:
    """Collects per-sample values ([B] tensors, left on their device) and reduces them over all processes."""

    def __init__(self) -> None:
        self.values: dict[str, list[Tensor]] = {}
        self.steps: list[int] = []
        self.indices: list[Tensor] = []

    def add(self, parts: dict[str, Tensor], step: int, indices: Tensor) -> None:
        """Take the parts of one batch of ``step``, of the images ``indices`` ([B]); nothing is synchronised here."""
        self.steps.append(step)
        self.indices.append(indices)
        for name, value in parts.items():
            self.values.setdefault(name, []).append(value.detach().float().reshape(-1))

    def first_not_finite(self) -> str | None:
        """What was NaN or infinite first since the last `reduce`, in words; None: nothing was."""
        return first_not_finite(self.values, self.steps, self.indices)

    def reduce(self, accelerator: Accelerator) -> dict[str, float]:
        """Means (plus quantiles where asked) over every sample since the last call, all processes.

        Every process must call it with the same names.
        """
        result: dict[str, float] = {}
        for name in sorted(self.values):
            values = torch.cat(self.values[name])
            if name in QUANTILES:
                gathered = accelerator.gather(values)
                for quantile in QUANTILES[name]:
                    result[f"{name}_p{100 * quantile:.0f}"] = float(torch.quantile(gathered, quantile))
                result[f"{name}_max"] = float(gathered.max())
            total = accelerator.reduce(torch.stack([values.sum(), values.new_tensor(float(len(values)))]), "sum")
            result[LOG_NAMES.get(name, name)] = float(total[0] / total[1])
        for collected in (self.values, self.steps, self.indices):
            collected.clear()
        return result


class WaitTimer:
    """How long a loop waits for what it goes over: ``seconds``, to be set back by the reader."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def over(self, iterable: Iterable[T]) -> Iterator[T]:
        """The same items, the time until each is there being counted."""
        items = iter(iterable)
        while True:
            started = time.perf_counter()
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                self.seconds += time.perf_counter() - started
            yield item


class Log:
    """`log.jsonl`, a line per logging step, written by the main process; trackers get the same numbers."""

    def __init__(self, path: Path, accelerator: Accelerator) -> None:
        self.path = path
        self.accelerator = accelerator

    def rewind(self, phase: str, step: int) -> None:
        """Drop the lines of steps after the checkpoint that a resumed run goes on from. Every process must call it."""

        def drop() -> None:
            if not self.path.exists():
                return
            kept = [
                entry
                for entry in read_log(self.path)
                if not (phase == "standard" and entry["phase"] == "robust")
                and not (entry["phase"] == phase and entry["step"] > step)
            ]
            write_whole(self.path, "".join(json.dumps(entry) + "\n" for entry in kept))

        main_only(self.accelerator, drop)

    def write(self, entry: dict[str, Any], tracker_step: int) -> None:
        """Append one line; numbers also go to the tracker, under ``<phase>/<name>``, whose steps never go back.

        Every process must call it. Raises as `main_only` does: of a full disk or a tracker that fails all learn.
        """
        rounded = {key: _json_number(value) for key, value in entry.items()}
        numbers = {f"{entry['phase']}/{k}": v for k, v in entry.items() if isinstance(v, (int, float)) and k != "step"}

        def append() -> None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rounded) + "\n")
            self.accelerator.log(numbers, step=tracker_step)

        main_only(self.accelerator, append)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a `log.jsonl`, without those that are damaged: one is cut short where a run was killed."""
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("phase"), str) and isinstance(entry.get("step"), int):
            entries.append(entry)
    return entries


def _json_number(value: Any) -> Any:
    """Floats to six decimals; JSON has no infinity (a skipped fp16 step's gradient norm), so that becomes null."""
    if not isinstance(value, float):
        return value
    return round(value, 6) if math.isfinite(value) else None


def progress_bar(
    total: int | None,
    initial: int,
    description: str,
    accelerator: Accelerator,
    *,
    nested: bool = False,
    fractional: bool = False,
) -> tqdm:
    """Images done, images/s and time left, on the main process only. ``fractional``: parts of an image count too.

    A ``nested`` bar runs below another and vanishes when it is done; a log file, where lines cannot be redrawn, gets
    a line of the outer bars now and then and no nested ones.
    """
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit=" images",
        disable=not accelerator.is_main_process or (nested and not terminal),
        dynamic_ncols=True,
        mininterval=0.2 if terminal else 15.0,
        leave=not nested,
        bar_format=FRACTIONAL if fractional else None,
    )
