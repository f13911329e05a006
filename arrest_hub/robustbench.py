"""An evaluation as an entry of RobustBench's leaderboards, in its `model_info` form; what is unknown stays empty.

No torch. RobustBench: Croce et al. 2021, arXiv 2010.09670.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from arrest_hub.errors import ConfigError
from arrest_hub.files import write_whole
from arrest_hub.results import EvalReport, Result, attack_title

STANDARD_PARTS = ("apgd-ce", "apgd-t", "fab-t", "square")
REQUIRED = ("link", "name", "authors", "venue", "additional_data", "architecture")
"""What a submission must state; the paper's own facts are not in an evaluation."""


@dataclass(frozen=True)
class Board:
    """What RobustBench evaluates on: ``n`` images of one of ``splits``, at the radii ``eps`` by norm."""

    n: int
    splits: tuple[str, ...]
    images: str
    eps: Mapping[str, str]
    size: tuple[int, int] | None = None
    """Height and width of the images that are attacked, where every entry's are."""


_BOARDS = {
    "cifar10": Board(10_000, ("test",), "the 10,000 test images", {"linf": "8/255", "l2": "0.5"}, (32, 32)),
    "cifar100": Board(10_000, ("test",), "the 10,000 test images", {"linf": "8/255"}, (32, 32)),
    "imagenet": Board(5_000, ("validation", "val"), "5,000 validation images of its own choice", {"linf": "4/255"}),
}
_METHODS = {
    "arrest": "ARREST (arXiv 2308.16454)",
    "at": "adversarial training",
    "trades": "TRADES (arXiv 1901.08573)",
}


def robustbench_dataset(dataset: str) -> str | None:
    """``cifar10``, ``cifar100`` or ``imagenet``, for a name, Hub id or folder that ends in it; None for others."""
    last = re.split(r"[/\\]", dataset.rstrip("/\\"))[-1]
    name = re.split("[:@]", last)[0].lower().replace("-", "").replace("_", "")
    name = {"imagenet1k": "imagenet"}.get(name, name)
    return name if name in _BOARDS else None


def robustbench_problems(dataset: str, norm: str, attacks: Sequence[str]) -> list[str]:
    """Why an evaluation with these settings gives no entry: a line for each reason. To be asked before it starts."""
    problems = []
    if robustbench_dataset(dataset) is None:
        problems.append(
            f"RobustBench has no leaderboard for the dataset {dataset!r}: it has cifar10, cifar100 and imagenet. Leave "
            "out --robustbench-json."
        )
    if norm not in ("linf", "l2"):
        problems.append(
            f"RobustBench has leaderboards for linf and l2, not for {norm}: give --norm linf or l2, or leave out "
            "--robustbench-json."
        )
    if "autoattack" not in attacks:
        problems.append("an entry of RobustBench needs AutoAttack's accuracy: run `--attacks autoattack`.")
    return problems


def robustbench_entry(report: EvalReport, *, training: Mapping[str, Any] | None) -> dict[str, Any]:
    """The entry in the form of RobustBench's `model_info` files.

    Accuracies are strings in per cent. The paper's facts are "" and ``additional_data`` is None, see `missing_fields`.
    Of several AutoAttack figures the newest, which is the last, is taken. ``training`` is the configuration that
    `arrest-finetune` wrote beside the model, None for any other model.

    Raises:
        ConfigError: no entry can be made of these figures, naming every reason.
    """
    rows = [row for row in report.results if row.attack == "autoattack" and row.metric == "robust_accuracy"]
    if not rows:
        tried = report.results[0] if report.results else None
        problems = robustbench_problems(tried.dataset, tried.norm or "linf", ()) if tried else []
        raise ConfigError(problems or "there are no figures: run `--attacks autoattack`.")
    robust = rows[-1]
    problems = robustbench_problems(robust.dataset, robust.norm or "", ("autoattack",))
    parts = [part.get("name") for part in robust.attack_parameters.get("parts", [])]
    if absent := [part for part in STANDARD_PARTS if part not in parts]:
        problems.append(
            f"AutoAttack ran without {', '.join(absent)}, and RobustBench needs its four standard parts: run "
            "`--attacks autoattack` on a model with at least four classes."
        )
    place = robust.dataset, robust.split, robust.n
    clean = next(
        (row for row in report.results if row.metric == "clean_accuracy" and (row.dataset, row.split, row.n) == place),
        None,
    )
    if clean is None:
        problems.append(
            "clean accuracy on the same images is missing: run `--attacks autoattack`, which measures both."
        )
    dataset = robustbench_dataset(robust.dataset)
    if problems or clean is None or dataset is None:
        raise ConfigError(problems)
    accuracy = _per_cent(robust)
    entry: dict[str, Any] = {
        "link": "",
        "name": "",
        "authors": "",
        "additional_data": None,
        "number_forward_passes": 1,
        "dataset": dataset,
        "venue": "",
        "architecture": str(report.model.get("architecture") or ""),
        "eps": eps_text(robust.norm or "", robust.eps or ""),
        "clean_acc": _per_cent(clean),
        "reported": accuracy,
        "autoattack_acc": accuracy,
    }
    footnote = " ".join(
        [*_training_notes(training), *_image_notes(robust, _BOARDS[dataset]), *_setting_notes(report, robust, dataset)]
    )
    if footnote:
        entry["footnote"] = footnote
    entry["unreliable"] = bool(report.warnings)
    return entry


def missing_fields(entry: Mapping[str, Any]) -> list[str]:
    """The fields that a person must fill in before the entry can be submitted."""
    return [name for name in REQUIRED if entry.get(name) in ("", None)]


def write_robustbench(path: Path, report: EvalReport, *, training: Mapping[str, Any] | None) -> list[str]:
    """Write the entry, whole or not at all, and return what is still missing in it.

    Raises:
        ConfigError: see `robustbench_entry`; nothing is written then.
    """
    entry = robustbench_entry(report, training=training)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(entry, indent=2, ensure_ascii=False) + "\n")
    return missing_fields(entry)


def eps_text(norm: str, eps: str) -> str:
    """As the leaderboards write a radius: linf in 255ths (8/255), l2 as a decimal (0.5); as typed where not exact."""
    value = Fraction(eps)
    scaled = value * 255
    if norm == "linf" and scaled.denominator == 1:
        return f"{scaled.numerator}/255"
    decimal = repr(float(value))
    return decimal if norm == "l2" and Fraction(decimal) == value else eps


def _per_cent(row: Result) -> str:
    return f"{100 * row.value:.2f}"


def _training_notes(training: Mapping[str, Any] | None) -> list[str]:
    if not training or training.get("method") not in _METHODS or not training.get("model"):
        return []
    method, model = _METHODS[training["method"]], str(training["model"])
    if model.startswith(("/", "~", ".", "\\")) or re.match(r"[A-Za-z]:\\", model):
        # where it lies on somebody's disk is nobody else's business
        model = re.split(r"[/\\]", model.rstrip("/\\"))[-1]
    if training.get("init") != "random":
        return [f"It is finetuned by {method} from {model}."]
    source = f"with {model} as the standard teacher" if training["method"] == "arrest" else f"(architecture: {model})"
    return [f"It is trained from random weights by {method} {source}."]


def _image_notes(row: Result, board: Board) -> list[str]:
    # of ImageNet even 5,000 images need not be the same ones
    if row.n == board.n and row.split in board.splits and board.splits == ("test",):
        return []
    return [f"Evaluated on {row.n:,} images of the split {row.split!r}; RobustBench uses {board.images}."]


def _size_note(norm: str, size: tuple[int, ...], expected: tuple[int, int]) -> str:
    (height, width), (their_height, their_width) = size, expected
    note = (
        f"The images are resized to {height}x{width} and attacked there; RobustBench attacks them at "
        f"{their_height}x{their_width}."
    )
    if norm == "l2" and height * width > their_height * their_width:
        # a perturbation that is the same in every pixel grows with the root of their number
        ratio = (height * width / (their_height * their_width)) ** 0.5
        note += f" The same l2 radius then allows perturbations up to {ratio:.1f} times weaker."
    return note


def _setting_notes(report: EvalReport, row: Result, dataset: str) -> list[str]:
    """What differs from RobustBench's own evaluation, and what speaks against the figure."""
    notes = []
    usual = _BOARDS[dataset].eps.get(row.norm or "")
    if usual is None:
        notes.append(f"RobustBench has no {dataset} leaderboard for {row.norm}.")
    elif Fraction(usual) != Fraction(row.eps or ""):
        notes.append(f"The radius of RobustBench's {dataset} {row.norm} leaderboard is {usual}.")
    size, expected = report.preprocessing.get("size"), _BOARDS[dataset].size
    if expected is not None and size is not None and tuple(size) != expected:
        notes.append(_size_note(row.norm or "", tuple(size), expected))
    if report.precision != "fp32":
        notes.append(f"Evaluated in {report.precision}.")
    if before := row.attack_parameters.get("after"):
        titles = ", ".join(attack_title(name) for name in before)
        notes.append(f"AutoAttack's accuracy is the worst case together with {titles}.")
    if report.warnings:
        names = "; ".join(check.name for check in report.warnings)
        notes.append(f"Signs that the robustness may be overestimated: {names}.")
    return notes
