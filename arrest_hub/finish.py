"""The end of a run: export the chosen weights, reload them as a stranger would, measure, write results and card."""

from __future__ import annotations

import dataclasses
import filecmp
import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator

from arrest_hub.attacks import frozen_eval, pgd
from arrest_hub.backbones import Backbone, load_backbone
from arrest_hub.card_facts import CardFacts, Publication
from arrest_hub.checkpoint import REPLACED, Progress, best_folder, flush_to_disk
from arrest_hub.config import FinetuneConfig
from arrest_hub.config_sources import load_config
from arrest_hub.data import Splits, eval_loader, to_pixels
from arrest_hub.errors import ArrestError
from arrest_hub.estimate import random_batch
from arrest_hub.eval_config import EvalConfig
from arrest_hub.eval_session import EvalSession
from arrest_hub.eval_subjects import dataset_name, module_subject, split_images
from arrest_hub.evaluator import logits_function
from arrest_hub.export import weights_digest, write_model_folder
from arrest_hub.figures import save_figure
from arrest_hub.files import as_os_error, write_whole
from arrest_hub.guards import not_finite_tensor
from arrest_hub.hub import given_license
from arrest_hub.hub_repository import Pushed
from arrest_hub.journal import Journal
from arrest_hub.machine import hardware_name, library_versions
from arrest_hub.model_card import before_name, card_is_generated, render_card
from arrest_hub.out_of_memory import fitting_batch
from arrest_hub.prepare import new_accelerator
from arrest_hub.processes import from_main, main_only, raise_together
from arrest_hub.progress import read_log
from arrest_hub.provenance import exported_config, training_record
from arrest_hub.pushed_files import CARD, weight_files
from arrest_hub.results import EvalReport, Result, results_table
from arrest_hub.run_folder import RunPaths
from arrest_hub.training_figure import training_figure
from arrest_hub.training_record import FILE_NAME as RECORD
from arrest_hub.training_record import BaseModel
from arrest_hub.transforms import eval_transform
from arrest_hub.validation import (
    PgdSettings,
    arithmetic,
    count_correct,
    to_results,
)


@dataclass
class RunDir:
    """A finished run: its folder, the folder to publish, the final figures, and where it was published, if it was."""

    path: Path
    export: Path
    report: EvalReport
    pushed: Pushed | None = None


def finish_run(
    config: FinetuneConfig,
    paths: RunPaths,
    accelerator: Accelerator,
    splits: Splits,
    student: Backbone | None,
    *,
    progress: Progress,
    num_workers: int,
    teacher_id: str | None,
    base: BaseModel | None,
) -> RunDir:
    """Write `checkpoints/last` and `export/`, evaluate both networks from their folders, print the table.

    An `export/` that is whole and has these weights already is left as it is, with what was added to it since.
    ``student`` holds the last weights, in the main process; the best ones are in `checkpoints/best-<step>` if there
    were validation images. ``teacher_id`` is what `load_backbone` takes for the network before robust finetuning, None
    if there is none; ``base`` is the one that the run began with. Raises ArrestError if the weights are not finite.
    """
    broken = None if student is None else not_finite_tensor(student.state_dict().items())
    raise_together(
        accelerator,
        f"the trained weights {broken} are not finite: training diverged. Start again with a smaller --lr, or with "
        "--warmup-epochs or --clip-grad 1."
        if broken
        else None,
    )
    use_best = config.export_weights == "best" and progress.best_step is not None
    exported_step = progress.best_step if use_best and progress.best_step is not None else progress.step
    chosen_weights = best_folder(paths.checkpoints, exported_step) if use_best else paths.checkpoints / "last"
    saved = load_config(paths.config)  # a run that had nothing left to train may have been given another batch
    trained = dataclasses.replace(config, batch_size=saved.batch_size, grad_accum_steps=saved.grad_accum_steps)
    record = training_record(trained, accelerator, splits, base, progress, paths.checkpoints, exported_step)

    def export() -> EvalReport | None:
        assert student is not None  # in the main process
        write_model_folder(student, paths.checkpoints / "last")
        finished = _finished_before(chosen_weights, paths.export)
        if finished is None:
            _copy_whole(chosen_weights, paths.export)
        return finished

    report = from_main(accelerator, export)
    chosen = f"best validation score, step {progress.best_step}" if use_best else f"last, step {progress.step}"
    for tracker in accelerator.trackers:  # Accelerate's own end_training would also part the processes
        tracker.finish()
    accelerator.free_memory()
    if report is not None:
        accelerator.print(
            f"\n{paths.export} is whole and has these weights ({chosen}): it is left as it is. Delete it to have "
            "it made anew"
        )
        return _told(config, paths, accelerator, report)
    accelerator.print(f"\nexported {paths.export} ({chosen})")

    accelerator = new_accelerator(mixed_precision="no")
    measured = measure_export(config, paths, accelerator, splits, num_workers=num_workers, teacher_id=teacher_id)

    def describe() -> None:
        values = yaml.safe_dump(exported_config(trained, base), sort_keys=False, allow_unicode=True)
        write_whole(paths.export / "training_config.yaml", values)
        record.write(paths.export / RECORD)
        measured.model["steps"] = progress.step
        measured.write(paths.export / "results.json")
        if config.figures:
            _draw_training(config, paths)
        flush_to_disk(paths.export)  # the card comes last: where it is, all is there
        if card_is_generated(paths.export):
            publication = Publication(license=given_license(config))
            write_whole(paths.export / CARD, render_card(CardFacts.from_folder(paths.export, publication)))
        else:
            accelerator.print(f"note        {paths.export / CARD} was edited and is left as it is")

    main_only(accelerator, describe)
    return _told(config, paths, accelerator, measured)


def _told(config: FinetuneConfig, paths: RunPaths, accelerator: Accelerator, report: EvalReport) -> RunDir:
    """The finished run, its figures printed."""
    accelerator.print("\n" + results_table(report, before_name(config.method), f"student ({config.method})"))
    first = report.results[0]
    accelerator.print(f"{first.n:,} images of {first.dataset} [{first.split}], fp32, 95 % intervals in brackets")
    figures = (paths.export / "figures").is_dir()
    accelerator.print(f"{paths.export}: model, results.json, README.md" + ", figures/" * figures)
    return RunDir(paths.root, paths.export, report)


def _draw_training(config: FinetuneConfig, paths: RunPaths) -> None:
    """`figures/training.png`, from log.jsonl."""
    figure = training_figure(
        read_log(paths.log),
        rgkd_weight={"arrest": config.rgkd_weight, "trades": config.trades_beta}.get(config.method),
        replay_threshold=config.replay_threshold if config.method == "arrest" else None,
    )
    save_figure(figure, paths.export / "figures" / "training.png")


def measure_export(
    config: FinetuneConfig,
    paths: RunPaths,
    accelerator: Accelerator,
    splits: Splits,
    *,
    num_workers: int,
    teacher_id: str | None,
) -> EvalReport:
    """Clean and PGD accuracy of `export/` and of the teacher, both loaded anew, on the test split in fp32.

    The figures are those of ``arrest-eval export/ --attacks clean,pgd-N --batch-size B`` with the run's seed; the
    verdicts and the pictures are put into `export/` too. A stream is counted in one pass instead.
    """
    student = load_backbone(str(paths.export)).to(accelerator.device)
    teacher = None
    if teacher_id is not None:
        own = Path(teacher_id) == paths.teacher
        teacher = load_backbone(
            teacher_id, image_size=None if own else config.image_size, allow_pickle=config.allow_pickle
        ).to(accelerator.device)
    batch_size = evaluation_batch(student, int(config.batch_size), accelerator)
    if batch_size < config.batch_size:
        accelerator.print(
            f"note        evaluated {batch_size} images at a time, not {config.batch_size}: an attack on so many does "
            "not fit into memory in fp32"
        )
    if splits.test.streaming:
        report = _count_stream(config, accelerator, splits, student, teacher, batch_size, num_workers=num_workers)
    else:
        report = _measure_images(
            config, paths, accelerator, splits, student, teacher, batch_size, num_workers=num_workers
        )
    report.model = {
        "architecture": student.source.architecture, "library": student.source.library,
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
        "weights_sha256": weights_digest(student), "weights_files": weight_files(paths.export),
    }  # fmt: skip
    if teacher is not None:
        report.model["teacher_sha256"] = weights_digest(teacher)
    if teacher is not None and teacher.source.hub_id is not None:  # another machine can find it too
        report.model["teacher"] = teacher_id
    return report


def evaluation_batch(network: Backbone, batch_size: int, accelerator: Accelerator) -> int:
    """``batch_size``, halved until PGD in fp32 on so many images fits into the device's memory, in every process.

    A batch that trains, in bf16, with recomputed activations or memory of its own, need not. On a CPU nothing is tried:
    its memory is never simply full.
    """
    if accelerator.device.type == "cpu":
        return batch_size
    return fitting_batch(partial(_attack_once, network, accelerator.device), batch_size, accelerator)


def _attack_once(network: Backbone, device: torch.device, count: int) -> None:
    """A step of the final evaluation's attack on ``count`` images."""
    batch = random_batch(network, count, device)
    generator = torch.Generator(device=device).manual_seed(0)
    with frozen_eval(network), arithmetic():
        pgd(
            logits_function(network, device=device), to_pixels(batch["pixels"]), batch["label"], eps=8 / 255,
            step_size=2 / 255, steps=1, generator=generator,
        )  # fmt: skip


def _measure_images(
    config: FinetuneConfig,
    paths: RunPaths,
    accelerator: Accelerator,
    splits: Splits,
    student: Backbone,
    teacher: Backbone | None,
    batch_size: int,
    *,
    num_workers: int,
) -> EvalReport:
    wanted = EvalConfig(
        model=str(paths.export), dataset=config.dataset, norm=config.norm, eps=config.eps, checks=False,
        attacks=f"clean,pgd-{config.eval_attack_steps}", batch_size=batch_size, num_workers=num_workers,
        seed=config.seed, figures=config.figures,
    ).validate()  # fmt: skip
    images = split_images(
        splits.test, eval_transform(student.preprocessing), dataset_name(splits.dataset_id), student.label_names
    )
    subject, other = module_subject(student, "student"), module_subject(teacher, "teacher") if teacher else None
    session = EvalSession(
        wanted, accelerator, subject, other, images, Journal(None, {}, accelerator), student.num_classes,
    )  # fmt: skip
    measured = session.measure()

    def write() -> None:
        if config.figures:
            session.draw(paths.export / "figures", measured, dataclasses.asdict(config))
        measured.verdicts.write(paths.export / "verdicts.parquet")

    main_only(accelerator, write)
    return measured.report


def _count_stream(
    config: FinetuneConfig,
    accelerator: Accelerator,
    splits: Splits,
    student: Backbone,
    teacher: Backbone | None,
    batch_size: int,
    *,
    num_workers: int,
) -> EvalReport:
    settings = PgdSettings(config.norm, config.eps_value, config.eps_value / 4, config.eval_attack_steps)

    def measure(model: Backbone, name: str) -> list[Result]:
        loader = eval_loader(
            splits.test, eval_transform(model.preprocessing), batch_size=batch_size, num_workers=num_workers
        )
        with arithmetic():
            counts = count_correct(
                model.to(accelerator.device), accelerator.prepare(loader), accelerator, settings, seed=config.seed,
                description=f"test, {name}", total=splits.test.num_examples,
            )  # fmt: skip
        return to_results(
            counts,
            settings,
            eps=config.eps,
            dataset=dataset_name(splits.dataset_id),
            split=splits.test.name,
            seed=config.seed,
        )

    return EvalReport(
        results=measure(student, "student"),
        teacher_results=measure(teacher, "teacher") if teacher is not None else [],
        preprocessing=dataclasses.asdict(student.preprocessing),
        versions=library_versions(student.source.library),
        hardware=hardware_name(accelerator),
    )


def _finished_before(weights: Path, export: Path) -> EvalReport | None:
    """The figures of an `export/` that is whole and holds the model in ``weights``; None where it is to be written."""
    if not weights.is_dir():
        raise ArrestError(
            f"{weights} is gone, where the best weights were kept: put it back and go on with --resume, or take the "
            f"last weights, which are in {weights.with_name('last')}."
        )
    files = [path.name for path in weights.iterdir()]
    same, _, _ = filecmp.cmpfiles(weights, export, files, shallow=False)
    if same != files or not (export / CARD).is_file() or not (export / RECORD).is_file():
        return None
    try:
        return CardFacts.from_folder(export).report
    except (ValueError, KeyError, OSError):
        return None


def _copy_whole(source: Path, target: Path) -> None:
    """Replace ``target`` by a copy of ``source``, complete before it takes the name; a card that was edited stays."""
    temporary = target.with_name(f"{target.name}.{time.time_ns()}.tmp")
    try:
        shutil.copytree(source, temporary)
    except shutil.Error as error:
        raise as_os_error(error, temporary) from error
    if not card_is_generated(target):
        shutil.copyfile(target / CARD, temporary / CARD)
    replaced = target.with_name(target.name + REPLACED)
    if target.exists():  # set aside, for a card in it may be the only one
        target.rename(replaced)
    temporary.rename(target)
    shutil.rmtree(replaced, ignore_errors=True)
