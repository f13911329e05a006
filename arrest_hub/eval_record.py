"""The folder of an evaluation: what may be written where, the record itself, and its copy in the model's own folder."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from accelerate import Accelerator

from arrest_hub.card_facts import EVALUATION_FIGURES, CardFacts, read_card, read_publication
from arrest_hub.eval_config import EvalConfig, resume_problems
from arrest_hub.files import write_whole
from arrest_hub.model_card import DAMAGE, card_is_generated, render_card
from arrest_hub.processes import from_main, raise_together
from arrest_hub.pushed_files import weight_files
from arrest_hub.results import (
    CHANCE,
    TRANSFER,
    EvalReport,
    Result,
    attack_title,
    merge_reports,
    radius,
    read_results,
    strength_text,
    weaker_figures,
)
from arrest_hub.robustbench import write_robustbench
from arrest_hub.run_folder import hold_folder, is_unused, make_folder
from arrest_hub.verdicts import Verdicts, read_verdicts

PER_CLASS = "per_class.png"
CURVE = "eps_curve.png"


@dataclass
class EvalPaths:
    """The files of an evaluation."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "eval_config.yaml"

    @property
    def progress(self) -> Path:
        """Batches done so far; gone once the results are written."""
        return self.root / "progress"

    @property
    def results(self) -> Path:
        return self.root / "results.json"

    @property
    def verdicts(self) -> Path:
        return self.root / "verdicts.parquet"

    @property
    def has_work(self) -> bool:
        """Whether anything was measured: an evaluation that failed at its first image left nothing."""
        journals = self.progress.glob("rank-*.jsonl")
        return self.results.is_file() or any(len(path.read_bytes().splitlines()) > 1 for path in journals)

    @property
    def figures(self) -> Path:
        return self.root / "figures"

    def remove(self) -> None:
        """Delete what an evaluation writes; other evaluations and files in the folder stay."""
        shutil.rmtree(self.progress, ignore_errors=True)
        for path in (self.results, self.verdicts, self.config, *(self.figures / name for name in EVALUATION_FIGURES)):
            path.unlink(missing_ok=True)
        if self.figures.is_dir() and not any(self.figures.iterdir()):
            self.figures.rmdir()


def folder_problems(config: EvalConfig, paths: EvalPaths) -> list[str]:
    """Why the output folder cannot be used: it holds something that is neither to be resumed nor overwritten.

    Changes nothing. A folder that is no evaluation is never overwritten, nor one that the evaluation reads from.
    """
    root = paths.root
    if root.exists() and not root.is_dir():
        return [f"--output-dir {root} is a file: give a folder."]
    if is_unused(root):
        return []
    if not paths.config.is_file():
        return [
            f"--output-dir {root} is not empty and is not an evaluation (it has no {paths.config.name}): give another "
            "folder. Nothing in it is touched, not even with --overwrite."
        ]
    if config.overwrite:
        return [
            f"--overwrite would delete {name} {source}, which is inside --output-dir {root}: give another --output-dir."
            for name, source in (
                ("the model", config.model),
                ("--dataset", config.dataset),
                ("--teacher", config.teacher),
            )
            if source and (path := Path(source).expanduser()).exists() and path.resolve().is_relative_to(root.resolve())
        ]
    if config.resume:
        try:
            saved = yaml.safe_load(paths.config.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            saved = None
        if isinstance(saved, dict):
            return resume_problems(saved, config)
        return [f"cannot resume: {paths.config} is damaged. Start anew with --overwrite, or with another --output-dir."]
    if not paths.has_work:
        return []
    state = "holds an evaluation" if paths.results.is_file() else "holds an unfinished evaluation"
    return [
        f"--output-dir {root} already {state}. Continue it with --resume, replace it with --overwrite, or give another "
        "--output-dir."
    ]


@contextmanager
def hold_evaluation_folder(config: EvalConfig, paths: EvalPaths, accelerator: Accelerator) -> Iterator[None]:
    """`_start_folder`, and keep every other evaluation out of the folder until the end of the context.

    Raises:
        ArrestError: see `hold_folder`, or another node cannot make it.
    """
    with hold_folder(paths.root, partial(folder_problems, config, paths), accelerator):
        _start_folder(config, paths, accelerator)
        yield


def _start_folder(config: EvalConfig, paths: EvalPaths, accelerator: Accelerator) -> None:
    """Create the folder and write `eval_config.yaml`, deleting what an earlier evaluation wrote there if
    `--overwrite` was given, and nothing else. Nodes need not share a disk: each has journals, and the settings beside.

    Raises:
        ArrestError: the folder cannot be made.
    """

    def start() -> bool:
        if config.overwrite and paths.root.is_dir():
            paths.remove()
        return config.resume and paths.has_work

    goes_on = from_main(accelerator, start)
    if config.resume and not goes_on:
        accelerator.print(f"resume      there is nothing in {paths.root} yet: starting from the beginning")
    problem = None
    if accelerator.is_local_main_process:
        if not goes_on:  # the first line of a journal may be of other settings
            shutil.rmtree(paths.progress, ignore_errors=True)
        problem = make_folder(paths.root)
        if problem is None and not (goes_on and paths.config.is_file()):
            try:
                write_whole(paths.config, config.to_yaml())
            except OSError as error:
                problem = f"--output-dir {paths.root} cannot be written ({error.strerror}). Give another folder."
    raise_together(accelerator, problem)


def write_record(paths: EvalPaths, report: EvalReport, verdicts: Verdicts) -> None:
    """Verdicts first, then the results, which mark an evaluation that is complete."""
    verdicts.write(paths.verdicts)
    report.write(paths.results)


def entry_folder_problems(path: Path) -> list[str]:
    """Why an entry of RobustBench cannot be written there; its folder is made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return [f"--robustbench-json {path} cannot be written ({error.strerror}): give another file."]
    if not os.access(path.parent, os.W_OK):
        return [f"--robustbench-json {path} cannot be written (no permission for its folder): give another file."]
    return []


def write_entry(config: EvalConfig, report: EvalReport) -> list[str]:
    """The entry of RobustBench, if it is wanted: sentences to print."""
    if config.robustbench_json is None:
        return []
    missing = write_robustbench(Path(config.robustbench_json), report, training=training_facts(config.model))
    return [f"{config.robustbench_json}: RobustBench entry; to be filled in by hand: {', '.join(missing) or 'nothing'}"]


def training_facts(model: str) -> dict[str, Any] | None:
    """The `training_config.yaml` of a folder that `arrest-finetune` wrote; None for any other model, whatever such a
    file beside it may hold."""
    try:
        return _read_training(model)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None


def _read_training(model: str) -> dict[str, Any] | None:
    path = Path(model).expanduser() / "training_config.yaml"
    if not path.is_file():
        return None
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    return values if isinstance(values, dict) else None


def update_export(config: EvalConfig, report: EvalReport, verdicts: Verdicts, figures: Sequence[Path]) -> list[str]:
    """Put figures, verdicts and card into the model's own folder, if `arrest-finetune` wrote it: sentences to print.

    Figures of other weights are not mixed with these, and a card that was edited by hand is left alone. Figures of
    fewer images give way to the same ones of more.
    """
    folder = Path(config.model).expanduser()
    card = folder / "README.md"
    try:
        training = _read_training(config.model)
        if training is None or not (folder / "results.json").is_file():
            return []
        if closed := [path for path in (folder, folder / "figures") if path.is_dir() and not os.access(path, os.W_OK)]:
            return [f"{folder} is left as it is: there is no permission to write in {closed[0]}."]
        old = read_results(folder / "results.json")
        old_verdicts = read_verdicts(folder / "verdicts.parquet") if (folder / "verdicts.parquet").is_file() else None
        untouched = card_is_generated(folder)
        published = read_publication(read_card(card)) if card.is_file() else None
    except (ValueError, OSError, yaml.YAMLError) as error:
        return [f"{folder} is left as it is, since a file in it is damaged: {type(error).__name__}: {error}"]
    if old.model.get("weights_sha256") != report.model["weights_sha256"]:
        return [f"{folder} is left as it is: its results.json is of other weights than those evaluated."]
    report.model["weights_files"] = weight_files(folder)
    left = ""
    if _another_teacher(config, old, report):  # the card's teacher is the network that was finetuned
        report, figures = _without_teacher(report), []
        teacher = "the teacher found" if config.teacher == "auto" else config.teacher
        left += f"; without figures of {teacher}, not known to be where it came from, and pictures"
    trained = str(training.get("norm")), radius(str(training.get("eps")))
    here = config.norm, radius(config.eps)
    if _threat(report) is None and here != (_threat(old) or trained):  # what is beside clean accuracy is of the flags'
        report, figures = _without_threat(report), []
        left += f"; without checks, curve and pictures, which are of another threat model, {config.norm} {config.eps}"
    for earlier, row in weaker_figures(old.results, report.results):  # a robust accuracy is at most what any leaves
        report, verdicts = _without_attack(report, verdicts, row)
        left += (
            f"; without {attack_title(row.attack or '')} {strength_text(row)}, which leaves {100 * row.value:.1f} %, "
            f"since that {strength_text(earlier)} leaves {100 * earlier.value:.1f} %"
        )
    differing = _differences(old, report)
    superseded = bool(differing) and not config.cascade and _supersedes(report, old)
    if config.cascade:
        differing.append("these are of a cascade")
    if not differing and not _same_images(old, old_verdicts, verdicts):
        differing.append(
            "those are of other images of the split, drawn with another --seed or --limit-eval, or streamed"
        )
    if differing and not superseded:
        return [f"{folder} is left as it is, its figures would not stand beside these: {'; '.join(differing)}."]
    kept = verdicts if superseded else _merged_verdicts(old_verdicts, verdicts)
    if superseded:
        for name in EVALUATION_FIGURES:  # of the images that are no longer spoken of
            (folder / "figures" / name).unlink(missing_ok=True)
        report = dataclasses.replace(report, model=old.model | report.model)
    merged = report if superseded else merge_reports(old, report)
    figures = [figure for figure in figures if figure.name != PER_CLASS or merged.strongest() == report.strongest()]
    if _found(merged.strongest()) != _found(old.strongest()):
        (folder / "figures" / PER_CLASS).unlink(missing_ok=True)  # of an attack that is no longer the strongest
    if report.eps_curve:
        (folder / "figures" / CURVE).unlink(missing_ok=True)  # of the radii before
    new_figures = ", figures/" if figures else ""
    for figure in figures:
        (folder / "figures").mkdir(exist_ok=True)
        shutil.copyfile(figure, folder / "figures" / figure.name)
    kept.write(folder / "verdicts.parquet")
    merged.write(folder / "results.json")
    if untouched:
        try:
            text = render_card(CardFacts.from_folder(folder, published))
        except DAMAGE as error:
            return [f"{folder}: results.json, verdicts.parquet and figures are brought up to date; README.md is not, "
                    f"since a file beside it is damaged ({error})"]  # fmt: skip
        write_whole(card, text)
        return [f"{folder}: results.json, verdicts.parquet{new_figures} and README.md are brought up to date{left}"]
    return [
        f"{folder}: results.json, verdicts.parquet and figures are brought up to date; README.md was edited "
        f"and is left as it is{left}"
    ]


def _another_teacher(config: EvalConfig, old: EvalReport, new: EvalReport) -> bool:
    """Whether figures of a teacher are there that is not the one whose figures ``old`` has, as far as is known."""
    if not new.teacher_results:
        return False
    before = old.model.get("teacher_sha256")
    return config.teacher != "auto" if before is None else before != new.model.get("teacher_sha256")


def _without_teacher(report: EvalReport) -> EvalReport:
    curve = {name: points for name, points in report.eps_curve.items() if name != "teacher"}
    model = {name: value for name, value in report.model.items() if name not in ("teacher", "teacher_sha256")}
    checks = [check for check in report.checks if check.name != TRANSFER]
    return dataclasses.replace(report, teacher_results=[], eps_curve=curve, model=model, checks=checks)


def _without_threat(report: EvalReport) -> EvalReport:
    """Clean accuracy, and the check that is of it."""
    checks = [check for check in report.checks if check.name == CHANCE]
    return dataclasses.replace(report, eps_curve={}, checks=checks)


def _without_attack(report: EvalReport, verdicts: Verdicts, left: Result) -> tuple[EvalReport, Verdicts]:
    """Neither the figures of an attack nor its verdicts."""
    results, teacher_results = (
        [row for row in rows if row.attack != left.attack] for rows in (report.results, report.teacher_results)
    )
    broken_by = {name: column for name, column in verdicts.broken_by.items() if name != left.attack}
    return (
        dataclasses.replace(report, results=results, teacher_results=teacher_results),
        Verdicts(verdicts.index, verdicts.label, verdicts.prediction, broken_by, verdicts.metadata),
    )


def _threat(report: EvalReport) -> tuple[Any, ...] | None:
    """Norm and radius of a report's attacks; None where there is none."""
    return next(((row.norm, radius(row.eps)) for row in report.results if row.attack is not None), None)


def _differences(old: EvalReport, new: EvalReport) -> list[str]:
    """Why figures do not belong on one card: other images, arithmetic, size or threat model."""

    def facts(report: EvalReport) -> dict[str, Any]:
        clean = report.results[0]
        robust = next((row for row in report.results if row.attack is not None), None)
        return {
            "images": f"{clean.n} of {clean.dataset} [{clean.split}]",
            "precision": report.precision,
            "size": list(report.preprocessing.get("size", [])),
            "threat": f"{robust.norm} {robust.eps}" if robust else None,
        }

    before, after = facts(old), facts(new)
    if _threat(old) == _threat(new):  # 0.5 is 1/2
        before["threat"] = after["threat"]
    return [
        f"{name} {before[name]} there, {after[name]} here"
        for name in before
        if before[name] != after[name] and None not in (before[name], after[name])
    ]


def _supersedes(new: EvalReport, old: EvalReport) -> bool:
    """Whether ``new`` has every figure of ``old``, of more images of the same split, with no other threat, size or
    precision; layout and compilation may differ."""

    def figures(rows: Sequence[Result]) -> dict[tuple[Any, ...], int]:
        # a split is named with the number drawn from it: test[100]; train[held-out test] is not a part of train here
        return {
            (row.metric, row.attack, row.norm, radius(row.eps), row.dataset, re.sub(r"\[\d+\]$", "", row.split)): row.n
            for row in rows
        }

    def arithmetic(report: EvalReport) -> tuple[Any, ...]:
        return list(report.preprocessing.get("size", [])), report.precision.partition(",")[0]

    pairs = [(figures(old.results), figures(new.results)), (figures(old.teacher_results), figures(new.teacher_results))]
    return arithmetic(old) == arithmetic(new) and all(
        n < after.get(key, 0) for before, after in pairs for key, n in before.items()
    )


def _same_images(old: EvalReport, before: Verdicts | None, after: Verdicts) -> bool:
    """Whether figures are of the same images, as far as is known: a stream's have no verdicts, and the part that is
    taken or held out of a split is another one there."""
    if before is None:
        return "[" not in old.results[0].split
    return np.array_equal(before.index, after.index) and np.array_equal(before.label, after.label)


def _found(row: Result | None) -> tuple[Any, ...] | None:
    return None if row is None else (row.attack, row.correct, row.n)


def _merged_verdicts(old: Verdicts | None, new: Verdicts) -> Verdicts:
    """The new verdicts, with the attacks that earlier ones have on the same images and these have not.

    An earlier column stays as it was, so that its figure can be counted again: on other hardware the clean prediction
    of an image may have changed since.
    """
    earlier = {} if old is None else old.broken_by
    return Verdicts(new.index, new.label, new.prediction, earlier | new.broken_by, new.metadata)
