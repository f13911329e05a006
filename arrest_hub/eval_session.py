"""One evaluation under way: clean, the attacks, the checks, the curve, the pictures, the record, in this order."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from arrest_hub.attack_stages import AttackOutcome, ThreatModel, pgd_attack, run_attack
from arrest_hub.autoattack import part_problem
from arrest_hub.errors import ConfigError
from arrest_hub.eval_config import EvalConfig, parse_curve
from arrest_hub.eval_record import EvalPaths, training_facts, update_export, write_record
from arrest_hub.eval_subjects import EvalImages, Subject, load_teacher, module_subject, preprocessing_facts
from arrest_hub.evaluator import CleanOutcome, Evaluator
from arrest_hub.evidence import draw_figures, evenly_spaced, gallery_rows, measure_curve, measure_drift
from arrest_hub.figures import GalleryRow
from arrest_hub.journal import Journal
from arrest_hub.masking import CheckSettings, autoattack_checks, ball_check, chance_check, masking_checks
from arrest_hub.prepare import num_workers
from arrest_hub.results import Check, EvalReport, Result, results_table
from arrest_hub.validation import hardware_name, library_versions
from arrest_hub.verdicts import CLEAN, Verdicts


@dataclasses.dataclass
class Evaluation:
    """A finished evaluation: the figures, the verdicts behind them, and the folder they are in."""

    report: EvalReport
    verdicts: Verdicts
    folder: Path | None


class EvalSession:
    """One evaluation under way: what the steps share."""

    def __init__(
        self,
        config: EvalConfig,
        accelerator: Accelerator,
        subject: Subject,
        images: EvalImages,
        journal: Journal,
        paths: EvalPaths | None,
    ) -> None:
        self.config, self.accelerator, self.subject = config, accelerator, subject
        self.images, self.journal, self.paths = images, journal, paths
        self.threat = ThreatModel(config.norm, config.eps_value)
        self.notes: list[str] = list(images.notes)

    def evaluator(self, module: nn.Module, name: str = "") -> Evaluator:
        config = self.config
        module.to(self.accelerator.device)
        return Evaluator(
            torch.compile(module) if config.compile else module,  # type: ignore[arg-type]
            self.images.images, self.accelerator, self.journal, batch_size=config.batch_size,
            num_workers=num_workers(config.num_workers, self.accelerator), precision=config.precision,
            channels_last=config.channels_last, norm=config.norm, name=name,
        )  # fmt: skip

    def run(self, teacher_module: nn.Module | None) -> Evaluation:
        config, say = self.config, self.accelerator.print
        self.journal.share()
        evaluator = self.evaluator(self.subject.module)
        clean = evaluator.clean()
        problems = [part_problem(name, clean.num_classes) for name in config.attack_names]
        if any(problems):
            raise ConfigError([problem for problem in problems if problem])
        teacher = (
            module_subject(teacher_module, "teacher")
            if teacher_module is not None
            else load_teacher(config, self.subject, clean.num_classes, self.accelerator, self.notes)
        )
        for line in self.describe(teacher, clean):
            say(line)
        chance = chance_check(int((clean.prediction == clean.label).sum()), len(clean.label), clean.num_classes)
        if chance.status == "warn":
            say(f"warning: {chance.finding}")
        verdicts, outcomes = self.attack(evaluator, clean)
        report = EvalReport(
            results=self.results(clean, outcomes),
            precision=config.precision,
            preprocessing=preprocessing_facts(self.subject),
            versions=library_versions() | {"pyautoattack": version("pyautoattack")},
            hardware=hardware_name(self.accelerator),
            model=self.subject.info | ({"teacher": teacher.name} if teacher else {}),
            images_per_second=round(clean.images_per_second, 1),
        )
        other = self.evaluator(teacher.module, "teacher") if teacher else None
        if other is not None:
            report.teacher_results = self.teacher_results(other)
        report.checks = [chance]
        if config.checks:
            report.checks += self.checks(evaluator, other, clean, outcomes)
        positions = evenly_spaced(range(len(clean.label)), config.curve_images)
        if config.eps_curve is not None:
            self.curve(report, evaluator, other, positions)
        drifts = self.drifts(evaluator, teacher, positions)
        folder = None
        if self.paths is not None:
            folder = self.paths.root
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                self.write(report, verdicts, evaluator, clean.num_classes, drifts)
            self.accelerator.wait_for_everyone()
        for line in summary(report, self.subject.name, teacher.name if teacher else "teacher"):
            say(line)
        if folder is not None:
            say(f"{folder}: results.json, verdicts.parquet" + (", figures/" if config.figures else ""))
        return Evaluation(report, verdicts, folder)

    def attack(self, evaluator: Evaluator, clean: CleanOutcome) -> tuple[Verdicts, dict[str, AttackOutcome]]:
        """Every attack on every image that is right when clean (with --cascade: and still stands)."""
        config, n = self.config, len(clean.label)
        metadata = {"model": self.subject.name, "dataset": self.images.dataset, "split": self.images.split,
                    "norm": config.norm, "eps": config.eps, "seed": str(config.seed)}  # fmt: skip
        verdicts = Verdicts(clean.index, clean.label, clean.prediction, metadata=metadata)
        outcomes: dict[str, AttackOutcome] = {}
        right = np.flatnonzero(verdicts.clean_correct).tolist()
        fallen: dict[int, str] = {}
        for name in config.attack_names:
            outcome = run_attack(
                evaluator, name, [i for i in right if i not in fallen], threat=self.threat,
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

    def checks(
        self, evaluator: Evaluator, teacher: Evaluator | None, clean: CleanOutcome, outcomes: dict[str, AttackOutcome]
    ) -> list[Check]:
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
        _, pixels, labels, _ = next(evaluator.batches(range(count), [0]))
        return found + masking_checks(
            evaluator, evenly_spaced(right, config.check_images), settings,
            teacher=None if teacher is None else teacher.classify, first_batch=(pixels, labels),
            pixels_per_image=pixels[0].numel(),
        )  # fmt: skip

    def curve(
        self, report: EvalReport, evaluator: Evaluator, teacher: Evaluator | None, positions: Sequence[int]
    ) -> None:
        """Accuracy against eps, of the model and of its teacher."""
        radii = parse_curve(self.config.eps_curve or "")
        for name, one in (("student", evaluator), ("teacher", teacher)):
            if one is not None:
                report.eps_curve[name if teacher is not None else "model"] = measure_curve(
                    one, positions, radii, norm=self.config.norm, seed=self.config.seed, name=name
                )

    def drifts(self, evaluator: Evaluator, teacher: Subject | None, positions: Sequence[int]) -> dict[str, np.ndarray]:
        """Representation drift; nothing where a representation is not known or no picture is wanted."""
        student, reference = self.subject.backbone, teacher.backbone if teacher else None
        if not self.config.figures or student is None or reference is None or self.config.norm == "l1":
            return {}
        if student.num_features != reference.num_features:
            self.accelerator.print("no drift figure: teacher and student have representations of different size")
            return {}
        return measure_drift(
            evaluator, student, reference, positions, threat=self.threat, step_size=self.config.step_size_value,
            seed=self.config.seed,
        )  # fmt: skip

    def write(
        self, report: EvalReport, verdicts: Verdicts, evaluator: Evaluator, num_classes: int,
        drifts: dict[str, np.ndarray],
    ) -> None:  # fmt: skip
        """Everything into the record's folder, and into the model's own if arrest-finetune wrote it."""
        config, paths = self.config, self.paths
        assert paths is not None
        figures: list[Path] = []
        if config.figures:
            gallery: list[GalleryRow] = []
            if config.norm != "l1":
                attack = pgd_attack(
                    evaluator.classify, self.threat, steps=50, step_size=config.step_size_value, seed=config.seed,
                    name="gallery",
                )  # fmt: skip
                gallery = gallery_rows(evaluator, verdicts, attack, self.images.class_names)
            strongest, training = report.strongest(), training_facts(config.model) or {}
            figures = draw_figures(
                paths.figures, verdicts=verdicts, attack=strongest.attack if strongest else None, threat=self.threat,
                eps=config.eps, num_classes=num_classes, class_names=self.images.class_names, curve=report.eps_curve,
                gallery=gallery, drifts=drifts,
                replay_threshold=training.get("replay_threshold") if training.get("method") == "arrest" else None,
            )  # fmt: skip
        for line in write_record(config, paths, report, verdicts):
            self.accelerator.print(line)
        if config.update_export:
            for line in update_export(config, report, verdicts, figures):
                self.accelerator.print(line)
        self.journal.remove()

    def describe(self, teacher: Subject | None, clean: CleanOutcome) -> list[str]:
        """What is being evaluated, a line a subject."""
        config, info = self.config, self.subject.info
        revision = f" @ {info['revision'][:12]}" if info.get("revision") else ""
        size = self.subject.preprocessing.size if self.subject.preprocessing else None
        pixels = f", {size[0]}x{size[1]} px" if size else ""
        layout = "".join([", channels_last" * config.channels_last, ", compiled" * config.compile])
        tf32 = " without TF32" if config.precision == "fp32" else ""
        return [
            f"model       {self.subject.name}{revision} ({info['architecture']}, {info['parameters'] / 1e6:.2f} M "
            f"parameters{pixels}, {clean.num_classes} classes)",
            f"teacher     {teacher.name if teacher else 'none'}",
            f"data        {self.images.dataset} [{self.images.split}], {len(clean.label):,} images",
            *[f"            {note}" for note in self.notes],
            f"threat      {config.norm}, eps {config.eps}",
            f"attacks     {config.attacks}{' (cascade)' if config.cascade else ''}, batches of {config.batch_size}, "
            f"seed {config.seed}",
            f"precision   {config.precision}{tf32}{layout}, {hardware_name(self.accelerator)}",
            *([f"output      {self.paths.root}"] if self.paths else []),
        ]


def summary(report: EvalReport, name: str, teacher_name: str) -> list[str]:
    """The table and the warnings, as printed at the end."""
    first = report.results[0]
    lines = ["", results_table(report, f"teacher ({Path(teacher_name).name})", Path(name).name or name)]
    lines.append(
        f"{first.n:,} images of {first.dataset} [{first.split}], {report.precision}, 95 % intervals in brackets"
    )
    measured = [check for check in report.checks if check.status != "skipped"]
    if measured:
        lines.append(f"checks: {len(measured) - len(report.warnings)} pass, {len(report.warnings)} warn, "
                     f"{len(report.checks) - len(measured)} skipped")  # fmt: skip
    lines += [f"warning: {check.name}: {check.finding}" for check in report.warnings]
    return lines
