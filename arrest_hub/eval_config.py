"""The configuration of `arrest-eval`: what is attacked, with what, on which images, where the record goes. No torch."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

from arrest_hub.config import shared_field as _shared
from arrest_hub.errors import ConfigError, did_you_mean
from arrest_hub.fields import config_field as _field
from arrest_hub.fields import convert_all, eps_problem, flag, parse_fraction
from arrest_hub.files import safe_name

GROUPS = ("model", "data", "threat model", "attacks", "evidence", "run")
AUTOATTACK_PARTS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
ATTACKS = ("clean", "noise", "pgd-20", "autoattack", *AUTOATTACK_PARTS)
# What may differ between an evaluation and its resumption without changing a figure.
RESUME_MAY_DIFFER = ("output_dir", "resume", "overwrite", "num_workers", "robustbench_json", "update_export")


@dataclass
class EvalConfig:
    """Everything one evaluation needs to know.

    Raises:
        ConfigError: from `validate`, listing every problem at once.
    """

    # fmt: off
    model: str = _field("", "str", "model",
        "timm/<name>, org/name[@revision] on the Hub, a local folder, or a timm architecture name")
    teacher: str | None = _field("auto", "str", "model",
        "standard network to compare with (eps curve, drift, transfer); auto: the one the model was finetuned from, "
        "where that is known", optional=True)
    image_size: int | None = _shared("image_size")
    allow_pickle: bool = _shared("allow_pickle")

    dataset: str = _shared("dataset")
    image_column: str | None = _shared("image_column")
    label_column: str | None = _shared("label_column")
    eval_split: str | None = _field(None, "str", "data",
        "split to evaluate on; default: test, else validation, else (also of a "
        "single split) 10 %% held out", optional=True)
    label_match: str = _shared("label_match")
    limit_eval: int | None = _field(None, "int", "data",
        "use this many images, class-balanced", low=1, optional=True)
    num_workers: int | None = _field(None, "int", "data",
        "data loading processes; default: cores per process less one, at most 8; 0 on a CPU", low=0, optional=True)

    norm: str = _field("linf", "str", "threat model", "norm of the perturbation", choices=("linf", "l2", "l1"))
    eps: str = _field("8/255", "fraction", "threat model", "radius of the perturbation, pixels in [0, 1]", above=0)

    attacks: str | None = _field(None, "str", "attacks",
        "comma-separated: clean, noise, pgd-N, autoattack or its parts apgd-ce, apgd-dlr, apgd-t, fab, fab-t, square; "
        "default: clean,pgd-20,autoattack (l1: clean,autoattack)", optional=True)
    cascade: bool = _field(False, "bool", "attacks",
        "attack only the images that every earlier attack in the list left standing; each figure is then the worst "
        "case so far")
    pgd_restarts: int = _field(1, "int", "attacks", "random starts of pgd-N; the worst case over them counts", low=1)
    pgd_step_size: str | None = _field(None, "fraction", "attacks",
        "step of pgd-N; default: eps / 4", above=0, optional=True)
    batch_size: int = _field(128, "int", "attacks",
        "images attacked at once; the random draws of attacks depend on it", low=1)
    precision: str = _field("fp32", "str", "attacks",
        "arithmetic of the network; fp32 is without TF32", choices=("fp32", "tf32", "bf16"))
    attack_precision: str | None = _field(None, "str", "attacks",
        "arithmetic in which attacks look for adversarial images, whose verdicts stay in --precision; what fools the "
        "network in this arithmetic alone is attacked again in the other; default: --precision",
        choices=("fp32", "tf32", "bf16"), optional=True)
    channels_last: bool = _field(False, "bool", "attacks",
        "memory layout that convolutions are often faster in; rounds differently")
    compile: bool = _field(False, "bool", "attacks", "torch.compile the network; rounds differently")
    fold_batchnorm: bool = _field(False, "bool", "attacks",
        "attacks follow the network with BatchNorm folded into the convolutions, which is faster; as with "
        "--attack-precision, verdicts are the network's own")
    seed: int = _field(0, "int", "attacks", "seed of everything random", low=0, high=2 ** 31 - 1)

    checks: bool = _field(True, "bool", "evidence", "look for gradient masking")
    check_images: int = _field(100, "int", "evidence",
        "correctly classified images that the checks attack", low=1)
    eps_curve: str | None = _field(None, "str", "evidence",
        "accuracy against eps, as start:stop:count, such as 0:16/255:9", optional=True)
    curve_images: int = _field(1000, "int", "evidence",
        "images of the eps curve and the drift, drawn with --seed", low=1)
    figures: bool = _field(True, "bool", "evidence", "draw figures/")
    robustbench_json: str | None = _field(None, "str", "evidence",
        "also write the entry in RobustBench's model_info form to this file", optional=True)
    update_export: bool = _field(True, "bool", "evidence",
        "put results, figures and card into the model folder too, if arrest-finetune wrote it")

    output_dir: str = _field("", "str", "run",
        "record of the evaluation; default: evals/<model>-<dataset>-<norm>-<eps>")
    resume: bool = _field(False, "bool", "run", "go on where an evaluation in --output-dir was stopped")
    overwrite: bool = _field(False, "bool", "run", "delete an earlier evaluation in --output-dir")
    # fmt: on

    @property
    def eps_value(self) -> float:
        """eps as a float, on pixels in [0, 1]."""
        return float(Fraction(self.eps))

    @property
    def step_size_value(self) -> float:
        """PGD's step on pixels in [0, 1]; by default eps / 4."""
        return self.eps_value / 4 if self.pgd_step_size is None else float(Fraction(self.pgd_step_size))

    def arithmetic_name(self, *, folded: bool) -> str:
        """What a record says of the arithmetic: ``fp32``, or ``fp32 (attacks in tf32 and folded), channels_last``."""
        attacks = [f"in {self.attack_precision}"] * (self.attack_precision is not None) + ["folded"] * folded
        extra = ["channels_last"] * self.channels_last + ["compiled"] * self.compile
        return ", ".join([self.precision + (f" (attacks {' and '.join(attacks)})" if attacks else ""), *extra])

    @property
    def attack_names(self) -> list[str]:
        """The attacks without "clean", which is always measured."""
        return [name for name in (self.attacks or "").split(",") if name != "clean"]

    def validate(self) -> EvalConfig:
        """Check everything that can be checked without a download, and fill in `attacks` and `output_dir`.

        Raises:
            ConfigError: with a line for each problem.
        """
        good, problems = convert_all(self)
        if not self.model:
            problems.append("no model is given: name one, such as runs/mine/export or timm/resnet50.a1_in1k.")
        if not self.dataset:
            problems.append(
                "--dataset is missing: give digits, cifar10, cifar100, imagenet, a `datasets` id or a folder."
            )
        if "attacks" in good and self.attacks is not None and not self.attacks.strip(" ,"):
            problems.append("--attacks is empty: give names such as clean,pgd-20,autoattack, or leave it out.")
        elif "attacks" in good and "norm" in good:
            default = "clean,autoattack" if self.norm == "l1" else "clean,pgd-20,autoattack"
            names = [name.strip().lower() for name in (self.attacks or default).split(",") if name.strip()]
            self.attacks = ",".join(dict.fromkeys(["clean", *names]))
            problems += [problem for name in self.attack_names for problem in attack_problem(name, self.norm)]
        if self.attack_precision == self.precision:
            self.attack_precision = None
        if {"norm", "eps"} <= good:
            problems += eps_problem(self.norm, self.eps)
        if {"eps", "pgd_step_size"} <= good and self.pgd_step_size and self.step_size_value > 2 * self.eps_value:
            problems.append(
                f"--pgd-step-size {self.pgd_step_size} is more than the whole ball (2 x eps {self.eps}): "
                "give a smaller step."
            )
        if "eps_curve" in good and self.eps_curve is not None and "norm" in good:
            try:
                points = parse_curve(self.eps_curve)
                problems += [line.replace("--eps ", "--eps-curve ") for line in eps_problem(self.norm, str(points[-1]))]
            except ValueError as error:
                problems.append(str(error))
            if self.norm == "l1":
                problems.append("--eps-curve is drawn with PGD, which has linf and l2 only: leave it out for l1.")
        if {"resume", "overwrite"} <= good and self.resume and self.overwrite:
            problems.append("--resume and --overwrite contradict each other: give one of them.")
        if problems:
            raise ConfigError(problems)
        if not self.output_dir:
            self.output_dir = "evals/" + evaluation_name(self.model, self.dataset, self.norm, self.eps)
        self.output_dir = os.path.expanduser(self.output_dir)
        if self.robustbench_json is not None:
            self.robustbench_json = os.path.expanduser(self.robustbench_json)
        return self

    def to_yaml(self) -> str:
        """Every key with its resolved value, in the order of the help text."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)


EVAL_FIELDS: dict[str, dataclasses.Field[Any]] = {f.name: f for f in dataclasses.fields(EvalConfig)}


def attack_problem(name: str, norm: str) -> list[str]:
    """Why an attack cannot be run under a norm: no line or one."""
    pgd = re.fullmatch(r"pgd-([1-9]\d*)", name)
    if name in ATTACKS or pgd:
        if norm == "l1" and (pgd or name == "noise"):
            return [f"--attacks {name}: it has linf and l2 only. For l1 give autoattack or its parts."]
        return []
    if re.fullmatch(r"pgd-0+", name):
        return [f"--attacks {name!r} takes no step at all: give at least one, as in pgd-20."]
    if name == "pgd" or name.startswith("pgd"):
        return [f"--attacks {name!r} lacks its number of steps: give pgd-20."]
    return [
        f"--attacks {name!r} is not known: give clean, noise, pgd-N, autoattack, {', '.join(AUTOATTACK_PARTS)}."
        + did_you_mean(name, ATTACKS)
    ]


def parse_curve(text: str) -> list[Fraction]:
    """``"0:16/255:9"`` -> nine radii from 0 to 16/255, exactly.

    Raises:
        ValueError: saying what to type.
    """
    parts = text.split(":")
    try:
        start, stop, count = parse_fraction(parts[0]), parse_fraction(parts[1]), int(parts[2])
        if len(parts) != 3 or count < 2 or stop <= start:
            raise ValueError(text)
    except (ValueError, IndexError):
        raise ValueError(
            f"--eps-curve {text!r} is not start:stop:count with at least two rising radii, such as 0:16/255:9."
        ) from None
    return [start + (stop - start) * i / (count - 1) for i in range(count)]


def fraction_name(value: Fraction) -> str:
    """A radius as people write it: in 255ths where that is exact, so 8/255 and not 0.0313725; but 1 and not 255/255."""
    scaled = value * 255
    return f"{scaled.numerator}/255" if scaled.denominator == 1 and value.denominator > 1 else str(value)


def evaluation_name(*parts: str) -> str:
    """Parts joined by hyphens, made of characters that every file system takes, and as many as it takes; of paths the
    last two names, of ids on the Hub without the revision."""
    words = []
    for part in parts:
        folder = Path(part).expanduser()
        path = folder if folder.is_dir() else Path(part.split("@")[0].rstrip("/"))
        path = path.resolve() if path.name in ("", "..") else path
        # runs/mine/export says less by its last name than by the one before
        name = path.parent.name if path.name == "export" and path.parent.name else path.name
        words.append(part if re.fullmatch(r"\d+/\d+", part) else name)
    return "-".join(map(safe_name, words))


def unknown_eval_key(name: str) -> str:
    """One line for a misspelt flag, with the nearest real one."""
    return f"unknown flag --{name}.{did_you_mean('--' + name, [flag(key) for key in EVAL_FIELDS])} See --help."


def resume_problems(saved: Mapping[str, Any], config: EvalConfig) -> list[str]:
    """What differs between a saved evaluation and the one that is to continue it: a line for each."""
    new = dataclasses.asdict(config)
    return [
        f"{flag(key)} is {new[key]} but the evaluation to resume has {saved.get(key)}: give the same value, or another "
        "--output-dir."
        for key in new
        if key not in RESUME_MAY_DIFFER and key in saved and saved[key] != new[key]
    ]
