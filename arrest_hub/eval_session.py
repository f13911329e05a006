"""One evaluation under way: clean, the attacks, the checks, the curve, the pictures, the record, in this order."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from arrest_hub.attack_stages import AttackOutcome, ThreatModel, pgd_attack, run_attack
from arrest_hub.backbones import Backbone
from arrest_hub.eval_config import EvalConfig, parse_curve
from arrest_hub.eval_subjects import EvalImages, Subject, local_name, preprocessing_facts
from arrest_hub.evaluator import CleanOutcome, Evaluator, TensorImages
from arrest_hub.evidence import draw, draw_figures, gallery_rows, measure_curve, measure_drift
from arrest_hub.fields import small_radius
from arrest_hub.figures import GalleryRow
from arrest_hub.folding import FoldedNetwork
from arrest_hub.journal import Journal
from arrest_hub.machine import hardware_name, library_versions
from arrest_hub.masking import CheckSettings, autoattack_checks, ball_check, chance_check, masking_checks
from arrest_hub.prepare import num_workers
from arrest_hub.results import Check, EvalReport, Result, results_table
from arrest_hub.verdicts import CLEAN, Verdicts


@dataclasses.dataclass
class Evaluation:
    """What an evaluation found: the figures, and the verdicts behind them; ``drifts`` are for the picture alone."""

    report: EvalReport
    verdicts: Verdicts
    drifts: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


class EvalSession:
    """One evaluation under way: what its steps share. ``teacher``: the network to compare with, if any.

    Every process of a run must call the same methods in the same order; `draw` is for one process.
    """

    def __init__(
        self,
        config: EvalConfig,
        accelerator: Accelerator,
        subject: Subject,
        teacher: Subject | None,
        images: EvalImages,
        journal: Journal,
        num_classes: int,
    ) -> None:
        self.config, self.accelerator, self.num_classes = config, accelerator, num_classes
        self.subject, self.teacher, self.images, self.journal = subject, teacher, images, journal
        self.threat = ThreatModel(config.norm, config.eps_value)
        self.evaluator = self._evaluator(subject)
        self.arithmetic = config.arithmetic_name(folded=self.evaluator.search_model is not None)

    def _evaluator(self, subject: Subject, name: str = "") -> Evaluator:
        config, module = self.config, subject.module
        module.to(self.accelerator.device)
        if config.channels_last:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            if isinstance(module, Backbone):
                module.channels_last = True  # how its forward lays out the pixels
        dtype = torch.bfloat16 if (config.attack_precision or config.precision) == "bf16" else None
        search = FoldedNetwork(module, subject.pairs, dtype) if subject.pairs else None

        def compiled(network: nn.Module) -> nn.Module:
            return torch.compile(network) if config.compile else network  # type: ignore[return-value]

        return Evaluator(
            compiled(module), self.images.images, self.accelerator, self.journal, batch_size=config.batch_size,
            num_workers=self._workers(), precision=config.precision, attack_precision=config.attack_precision,
            search_model=compiled(search) if search is not None else None, channels_last=config.channels_last,
            norm=config.norm, name=name,
        )  # fmt: skip

    def _workers(self) -> int:
        """On a CPU none by default: attacks take far longer than decoding, and want every core."""
        wanted = self.config.num_workers
        if isinstance(self.images.images, TensorImages):  # nothing to decode
            return 0
        return 0 if wanted is None and self.accelerator.device.type == "cpu" else num_workers(wanted, self.accelerator)

    def measure(self) -> Evaluation:
        """Clean accuracy, every attack, the teacher's figures, the checks, the curve.

        Raises:
            ArrestError: see `Evaluator.clean`.
        """
        config, teacher = self.config, self.teacher
        self.journal.share()
        clean = self.evaluator.clean()
        chance = chance_check(int((clean.prediction == clean.label).sum()), len(clean.label), clean.num_classes)
        if chance.status == "warn":  # before the hours that the attacks may take
            self.accelerator.print(f"warning: {chance.finding}")
        verdicts, outcomes = self.attack(clean)
        # of a first batch compilation takes most of the time
        only_compiled = config.compile and len(clean.label) <= config.batch_size * self.accelerator.num_processes
        report = EvalReport(
            results=self.results(clean, outcomes),
            precision=self.arithmetic,
            preprocessing=preprocessing_facts(self.subject),
            versions=library_versions(self.subject.info.get("library", "timm"))
            | {"pyautoattack": version("pyautoattack")},
            hardware=hardware_name(self.accelerator),
            model=self.subject.info | self.teacher_facts(),
            images_per_second=None if only_compiled else round(clean.images_per_second, 1),
        )
        other = self._evaluator(teacher, "teacher") if teacher else None
        if other is not None:
            report.teacher_results = self.teacher_results(other)
        report.checks = [chance]
        if config.checks:
            report.checks += self.checks(other, clean, outcomes)
        positions = draw(range(len(clean.label)), config.curve_images, config.seed)
        if config.eps_curve is not None:
            self.curve(report, other, positions)
        return Evaluation(report, verdicts, self.drifts(positions))

    def teacher_facts(self) -> dict[str, str]:
        """What results.json says of the teacher: where it is on the Hub, if it is, and which weights it has."""
        if self.teacher is None:
            return {}
        found = {"teacher": self.teacher.hub_id, "teacher_sha256": self.teacher.info["weights_sha256"]}
        return {name: value for name, value in found.items() if value}

    def attack(self, clean: CleanOutcome) -> tuple[Verdicts, dict[str, AttackOutcome]]:
        """Every attack on every image that is right when clean (with --cascade: and still stands)."""
        config, n = self.config, len(clean.label)
        metadata = {"model": self.subject.info["id"], "dataset": self.images.dataset, "split": self.images.split,
                    "norm": config.norm, "eps": config.eps, "seed": str(config.seed)}  # fmt: skip
        verdicts = Verdicts(clean.index, clean.label, clean.prediction, metadata=metadata)
        outcomes: dict[str, AttackOutcome] = {}
        right = np.flatnonzero(verdicts.clean_correct).tolist()
        fallen: dict[int, str] = {}
        for name in config.attack_names:
            outcome = run_attack(
                self.evaluator, name, [i for i in right if i not in fallen], threat=self.threat,
                num_classes=clean.num_classes, of=n, seed=config.seed, pgd_step_size=config.step_size_value,
                pgd_restarts=config.pgd_restarts,
            )  # fmt: skip
            if config.cascade:
                outcome.parameters["after"] = list(outcomes)
                outcome.broken_by = fallen = fallen | outcome.broken_by
            outcomes[name] = outcome
            column = np.full(n, None, dtype=object)
            column[~verdicts.clean_correct] = CLEAN
            for position, part in outcome.broken_by.items():
                column[position] = part
            verdicts.broken_by[name] = column
        return verdicts, outcomes

    def results(self, clean: CleanOutcome, outcomes: dict[str, AttackOutcome]) -> list[Result]:
        """The rows of `results.json`."""
        config, n = self.config, len(clean.label)
        right = int((clean.prediction == clean.label).sum())
        place: dict[str, Any] = {
            "n": n,
            "dataset": self.images.dataset,
            "split": self.images.split,
            "seed": config.seed,
        }
        rows = [Result("clean_accuracy", None, None, None, right, seconds=clean.seconds, **place)]
        for name, outcome in outcomes.items():
            rows.append(
                Result(
                    "robust_accuracy",
                    name,
                    config.norm,
                    config.eps,
                    right - len(outcome.broken_by),
                    seconds=outcome.seconds,
                    attack_parameters=outcome.parameters,
                    **place,
                )
            )
        return rows

    def teacher_results(self, evaluator: Evaluator) -> list[Result]:
        """The teacher's figures, without AutoAttack and its parts: where PGD leaves nothing, they cannot."""
        config = self.config
        clean = evaluator.clean("teacher/clean")
        right = np.flatnonzero(clean.prediction == clean.label).tolist()
        outcomes = {
            name: run_attack(
                evaluator, name, right, threat=self.threat, num_classes=clean.num_classes, of=len(clean.label),
                seed=config.seed, pgd_step_size=config.step_size_value, pgd_restarts=config.pgd_restarts,
                scope="teacher/",
            )
            for name in config.attack_names if name == "noise" or name.startswith("pgd-")
        }  # fmt: skip
        return self.results(clean, outcomes)

    def checks(self, teacher: Evaluator | None, clean: CleanOutcome, outcomes: dict[str, AttackOutcome]) -> list[Check]:
        """Signs of gradient masking, from the figures and from attacks of their own."""
        config = self.config
        right = np.flatnonzero(clean.prediction == clean.label).tolist()
        found = [ball_check(outcomes, config.eps_value)] if outcomes else []
        if not config.cascade:
            found += autoattack_checks(outcomes, len(clean.label), len(right))
        steps = next((int(name[4:]) for name in outcomes if name.startswith("pgd-")), 20)
        ran_autoattack = "autoattack" in outcomes and not config.cascade
        settings = CheckSettings(
            self.threat, steps, config.step_size_value, config.seed, clean.num_classes, ran_autoattack
        )
        count = min(config.batch_size, len(clean.label))
        _, pixels, labels, _ = next(self.evaluator.batches(range(count), [0]))
        return found + masking_checks(
            self.evaluator, draw(right, config.check_images, config.seed), settings,
            teacher=teacher if self.teacher and self.teacher.gradients else None, first_batch=(pixels, labels),
            pixels_per_image=pixels[0].numel(), gradients=self.subject.gradients, reported=_strongest(outcomes),
        )  # fmt: skip

    def curve(self, report: EvalReport, teacher: Evaluator | None, positions: Sequence[int]) -> None:
        """Accuracy against eps, of the model and of its teacher."""
        radii = parse_curve(self.config.eps_curve or "")
        for name, one in (("student", self.evaluator), ("teacher", teacher)):
            if one is not None:
                report.eps_curve[name if teacher is not None else "model"] = measure_curve(
                    one, positions, radii, norm=self.config.norm, seed=self.config.seed, name=name
                )

    def drifts(self, positions: Sequence[int]) -> dict[str, np.ndarray]:
        """Representation drift; nothing where a representation is not known or no picture is wanted."""
        student, reference = self.subject.backbone, self.teacher.backbone if self.teacher else None
        if not self.config.figures or student is None or reference is None or self.config.norm == "l1":
            return {}
        if student.num_features != reference.num_features:
            self.accelerator.print("no drift figure: teacher and student have representations of different size")
            return {}
        return measure_drift(
            self.evaluator, student, reference, positions, threat=self.threat, step_size=self.config.step_size_value,
            seed=self.config.seed,
        )  # fmt: skip

    def draw(self, folder: Path, measured: Evaluation, training: Mapping[str, Any]) -> list[Path]:
        """Every picture there is something for, in ``folder``; ``training``: see `training_facts`."""
        config, report, verdicts = self.config, measured.report, measured.verdicts
        gallery: list[GalleryRow] = []
        if config.norm != "l1" and self.subject.gradients:
            attack = pgd_attack(
                self.evaluator.classify, self.threat, steps=50, step_size=config.step_size_value, seed=config.seed,
                name="gallery",
            )  # fmt: skip
            gallery = gallery_rows(self.evaluator, verdicts, attack, self.images.class_names)
        return draw_figures(
            folder, verdicts=verdicts, strongest=report.strongest(), threat=self.threat,
            eps=config.eps, num_classes=self.num_classes, class_names=self.images.class_names, curve=report.eps_curve,
            gallery=gallery, drifts=measured.drifts,
            replay_threshold=training.get("replay_threshold") if training.get("method") == "arrest" else None,
        )  # fmt: skip

    def describe(self, notes: Sequence[str]) -> list[str]:
        """What is being evaluated, a line a subject; ``notes`` go under the data."""
        config, info = self.config, self.subject.info
        revision = f" @ {info['revision'][:12]}" if info.get("revision") else ""
        size = self.subject.preprocessing.size if self.subject.preprocessing else None
        pixels = f", {size[0]}x{size[1]} px" if size else ""
        tf32 = " (no TF32)" if self.arithmetic.partition(",")[0] == "fp32" else ""
        folding = ", nothing to fold" if config.fold_batchnorm and self.evaluator.search_model is None else ""
        return [
            f"model       {self.subject.name}{revision} ({info['architecture']}, {info['parameters'] / 1e6:.2f} M "
            f"parameters{pixels}, {self.num_classes} classes)",
            f"teacher     {self.teacher.name if self.teacher else 'none'}",
            f"data        {self.images.dataset} [{self.images.split}], {len(self.images.images):,} images",
            *[f"            {note}" for note in notes],
            f"threat      {config.norm}, eps {config.eps}{small_radius(config.norm, config.eps)}",
            f"attacks     {config.attacks}{' (cascade)' if config.cascade else ''}, batches of {config.batch_size}, "
            f"seed {config.seed}",
            f"precision   {self.arithmetic}{tf32}{folding}, {hardware_name(self.accelerator)}",
        ]


def _strongest(outcomes: Mapping[str, AttackOutcome]) -> tuple[str, set[int]] | None:
    """The attack that broke most, and what; noise is none."""
    found = {name: set(outcome.broken_by) for name, outcome in outcomes.items() if name != "noise"}
    return max(found.items(), key=lambda pair: len(pair[1]), default=None)


def summary(report: EvalReport, name: str, teacher_name: str) -> list[str]:
    """The table and the warnings, as printed at the end."""
    first = report.results[0]
    short = Path(teacher_name).name
    lines = [
        "",
        results_table(report, "teacher" if short == "teacher" else f"teacher ({short})", local_name(name) or name),
    ]
    lines.append(
        f"{first.n:,} images of {first.dataset} [{first.split}], {report.precision}, 95 % intervals in brackets"
    )
    measured = [check for check in report.checks if check.status != "skipped"]
    if len(report.checks) > 1:  # more than that of the clean accuracy, which is always made
        lines.append(f"checks: {len(measured) - len(report.warnings)} pass, {len(report.warnings)} warn, "
                     f"{len(report.checks) - len(measured)} skipped")  # fmt: skip
    lines += [f"warning: {check.name}: {check.finding}" for check in report.warnings]
    return lines
