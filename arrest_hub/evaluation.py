"""`arrest-eval` and `arrest_hub.evaluate`: figures of robustness that can be counted again, with their evidence."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor, nn

from arrest_hub.autoattack import part_problem
from arrest_hub.backbones import Backbone
from arrest_hub.caller import own_forward, undisturbed
from arrest_hub.comparison import ComparedModel, comparison_json, comparison_markdown, plain_table
from arrest_hub.errors import ArrestError, BackboneError, ConfigError, DataError, HubError
from arrest_hub.eval_config import EvalConfig, evaluation_name
from arrest_hub.eval_identity import IDENTITY, check_record, eval_identity, read_record
from arrest_hub.eval_record import (
    EvalPaths,
    entry_folder_problems,
    folder_problems,
    hold_evaluation_folder,
    training_facts,
    update_export,
    write_entry,
    write_record,
)
from arrest_hub.eval_session import EvalSession, Evaluation, summary
from arrest_hub.eval_subjects import (
    EvalImages,
    Subject,
    TensorPair,
    count_classes,
    find_folding,
    load_images,
    load_subject,
    load_teacher,
    module_name,
    module_subject,
    tensor_images,
)
from arrest_hub.files import write_whole
from arrest_hub.journal import Journal
from arrest_hub.machine import bf16_warning
from arrest_hub.network_options import compile_problem
from arrest_hub.prepare import launcher_warning, new_accelerator
from arrest_hub.pretrained import PretrainedClassifier
from arrest_hub.processes import agree, from_main, main_only
from arrest_hub.results import EvalReport
from arrest_hub.robustbench import robustbench_problems
from arrest_hub.verdicts import Verdicts


def evaluate(
    model: str | os.PathLike[str] | nn.Module,
    dataset: str | os.PathLike[str] | TensorPair,
    *,
    teacher: str | nn.Module | None = "auto",
    output_dir: str | os.PathLike[str] | None = None,
    **options: Any,
) -> EvalReport:
    """Clean accuracy and accuracy under attack, with checks for gradient masking.

    Args:
        model: what `arrest-eval` takes, or any module from pixels [B, C, H, W] in [0, 1] to logits [B, K], which is put
            on the accelerator (in channels-last order, with ``channels_last=True``) and otherwise left as it is (modes
            of its modules, gradients of parameters). The precision is ``precision=``, also of one that Accelerate has
            prepared for another. Of one in DistributedDataParallel it is the module within: the images, which all
            processes must give alike, are shared out among them.
        dataset: what `arrest-eval` takes, or (pixels [N, C, H, W] as uint8 or floats in [0, 1], labels [N]).
        teacher: a standard network to compare with, by name or as a module; None: none.
        output_dir: where to write the record (results.json, verdicts.parquet, figures/); None: nowhere.
        options: the other fields of `EvalConfig`, such as ``attacks="clean,pgd-20"`` (or a list),
            ``eps="8/255"``, ``norm="l2"``.

    Raises:
        ArrestError: (ConfigError, BackboneError, DataError, HubError) for anything wrong with the input.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):  # which reaches other processes in every pass
        model = model.module
    if isinstance(teacher, nn.parallel.DistributedDataParallel):
        teacher = teacher.module
    if not isinstance(model, str | os.PathLike | nn.Module):
        raise ConfigError(f"model is a {type(model).__name__}: give a torch.nn.Module, a folder or an id.")
    if isinstance(options.get("attacks"), list | tuple):
        options["attacks"] = ",".join(options["attacks"])
    if not isinstance(teacher, str | os.PathLike | nn.Module | None):
        raise ConfigError(f"teacher is a {type(teacher).__name__}: give a torch.nn.Module, a folder or an id, or None.")
    module = model if isinstance(model, nn.Module) else None
    pair = dataset if isinstance(dataset, tuple) else None
    if pair is not None and (len(pair) != 2 or not all(isinstance(part, Tensor) for part in pair)):
        kinds = ", ".join(type(part).__name__ for part in pair)
        raise ConfigError(f"dataset is ({kinds}): give (pixels [N, C, H, W], labels [N]) as torch tensors.")
    if pair is None and not isinstance(dataset, str | os.PathLike):
        raise ConfigError(
            f"dataset is a {type(dataset).__name__}: give the name of one, a folder, or (pixels [N, C, H, W], labels "
            "[N]) as torch tensors."
        )
    teacher_module = teacher if isinstance(teacher, nn.Module) else None
    known = {f.name for f in dataclasses.fields(EvalConfig)}
    problems = [f"evaluate() has no option {name!r}." for name in options if name not in known]
    if pair is not None and options.get("limit_eval") is not None:
        problems.append("limit_eval is for a dataset with a name: of images given as tensors give fewer.")
    if isinstance(module, Backbone | PretrainedClassifier) and options.get("image_size") is not None:
        problems.append("image_size: the network has one already: load it with another, image_size=... there.")
    for name, network in (("model", model), ("teacher", teacher)):
        problems += _module_problem(name, network) if isinstance(network, nn.Module) else []
    if problems:
        raise ConfigError(problems)
    config = EvalConfig(
        model=type(module).__name__ if module is not None else os.fspath(model),  # type: ignore[arg-type]
        dataset="given images" if pair is not None else os.fspath(dataset),  # type: ignore[arg-type]
        teacher=None if teacher_module is not None else teacher,  # type: ignore[arg-type]
        output_dir="" if output_dir is None else os.fspath(output_dir),
        **options,
    )
    with own_forward(*filter(None, (module, teacher_module))):
        return run_evaluation(
            config, module=module, pair=pair, teacher_module=teacher_module, write=output_dir is not None
        ).report


def _module_problem(name: str, network: nn.Module) -> list[str]:
    """A line where a network cannot be attacked as it is, or its numbers not be multiplied with float32 images."""
    if any(isinstance(parameter, nn.UninitializedParameter) for parameter in network.parameters()):
        return [f"the {name} has layers without weights yet (torch's lazy ones): give it a batch of images first."]
    if any(tensor.is_inference() for tensor in (*network.parameters(), *network.buffers())):
        return [f"the {name} was made within torch.inference_mode() and gives no gradients: make it outside."]
    other = {value.dtype for value in network.parameters() if value.is_floating_point()} - {torch.float32}
    known = isinstance(network, Backbone | PretrainedClassifier)  # others may convert the images themselves
    if not other or not (known or torch.float64 in other):
        return []
    kinds = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in other))
    return [f"the {name}'s parameters are {kinds}, and images are float32: give {name}.float()."]


@undisturbed()
def run_evaluation(
    config: EvalConfig,
    *,
    module: nn.Module | None = None,
    pair: TensorPair | None = None,
    teacher_module: nn.Module | None = None,
    write: bool = True,
    notes: Sequence[str] = (),
) -> Evaluation:
    """Evaluate one model as ``config`` says. ``module`` and ``pair`` stand in for its model and dataset.

    Raises:
        ArrestError: for anything wrong with the input, before the first attack and with nothing overwritten.
    """
    config = dataclasses.replace(config).validate()
    paths = EvalPaths(Path(config.output_dir)) if write else None
    accelerator = _accelerator()

    def check() -> None:
        problems = precision_problems(config) + (folder_problems(config, paths) if paths else [])
        if config.compile and (problem := compile_problem(accelerator.device)):
            problems.append(problem)
        if config.robustbench_json is not None:
            problems += robustbench_problems(config.dataset, config.norm, config.attack_names)
            if Path(config.robustbench_json).is_dir():
                problems.append(f"--robustbench-json {config.robustbench_json} is a folder: give the name of a file.")
            if not problems:
                problems += entry_folder_problems(Path(config.robustbench_json))
        if problems:
            raise ConfigError(problems)

    main_only(accelerator, check)  # on another node the folder may be another one
    say = accelerator.print
    warnings = [launcher_warning(accelerator, "eval")]
    for name, precision in (("--precision", config.precision), ("--attack-precision", config.attack_precision)):
        warnings += [bf16_warning(accelerator, f"{name} fp32")] if precision == "bf16" else []
    for note in (*notes, *filter(None, warnings)):
        say(note)
    subject, images = _open(config, accelerator, module, pair)
    num_classes = _check_classes(config, subject, images, accelerator)
    done = from_main(accelerator, partial(read_record, paths)) if paths is not None and config.resume else None
    try:
        teacher = _teacher(config, teacher_module, subject, num_classes, images, accelerator)
        if teacher is not None and config.fold_batchnorm:
            find_folding(teacher, images)
    except ArrestError:
        if not done:  # of a finished evaluation it may be gone by now
            raise
        teacher = None
    identity = eval_identity(config, subject, teacher, images, accelerator)
    agree(accelerator, identity, "give all machines the same files, and all processes the same arguments.")
    if paths is not None and done:
        return _finished(config, paths, subject, identity, accelerator, *done)
    with nullcontext() if paths is None else hold_evaluation_folder(config, paths, accelerator):
        journal = Journal(paths.progress if paths else None, identity, accelerator)
        session = EvalSession(config, accelerator, subject, teacher, images, journal, num_classes)
        try:
            for line in session.describe(images.notes):
                say(line)
            measured = session.measure()
            measured.verdicts.metadata[IDENTITY] = json.dumps(identity)
            if paths is not None:
                _write(config, paths, session, measured)
        finally:
            journal.close()
    for line in summary(measured.report, subject.name, teacher.name if teacher else "teacher"):
        say(line)
    if paths is None and accelerator.is_main_process:
        for line in write_entry(config, measured.report):
            say(line)
    if paths is not None:
        say(f"{paths.root}: results.json, verdicts.parquet" + (", figures/" if config.figures else ""))
    return measured


def _write(config: EvalConfig, paths: EvalPaths, session: EvalSession, measured: Evaluation) -> None:
    """Everything into the record's folder, and into the model's own if arrest-finetune wrote it."""
    accelerator, report = session.accelerator, measured.report

    def write() -> None:
        training = training_facts(config.model) or {}
        figures = session.draw(paths.figures, measured, training) if config.figures else []
        write_record(paths, report, measured.verdicts)
        _publish(config, report, measured.verdicts, figures)

    main_only(accelerator, write)
    if accelerator.is_local_main_process:  # nodes need not share a disk
        session.journal.remove()
    accelerator.wait_for_everyone()


def _publish(config: EvalConfig, report: EvalReport, verdicts: Verdicts, figures: Sequence[Path]) -> None:
    """Into the model's own folder, and as an entry of RobustBench, where that is wanted; says so."""
    try:
        lines = update_export(config, report, verdicts, figures) if config.update_export else []
    except OSError as error:  # the record is written; somebody else's folder may be read-only
        lines = [f"{config.model} is not brought up to date ({error.strerror}: {error.filename})"]
    for line in lines:
        print(line)
    for line in write_entry(config, report):
        print(line)


def _accelerator() -> Accelerator:
    # a stage may keep one process waiting for another for long
    return new_accelerator(timeout=2 * 86400, mixed_precision="no")


def _finished(
    config: EvalConfig,
    paths: EvalPaths,
    subject: Subject,
    identity: dict[str, Any],
    accelerator: Accelerator,
    report: EvalReport,
    verdicts: Verdicts,
) -> Evaluation:
    """What --resume finds where there is nothing left to do. Versions and device may be others by now, and the teacher
    may be gone.

    Raises:
        ConfigError: the record is of other weights, images or preprocessing, or of another teacher.
    """
    check_record(paths, subject, identity, report, verdicts)
    accelerator.print(f"{paths.root} is complete: nothing is left to attack")
    if accelerator.is_main_process:
        shutil.rmtree(paths.progress, ignore_errors=True)  # left where it was killed after the last of its files
        _publish(config, report, verdicts, sorted(paths.figures.glob("*.png")))
    for line in summary(report, subject.name, str(report.model.get("teacher", "teacher"))):
        accelerator.print(line)
    return Evaluation(report, verdicts)


def precision_problems(config: EvalConfig) -> list[str]:
    """What this machine cannot do of the configuration: a line for each."""
    cuda, problems = torch.cuda.is_available(), []
    for name, precision in (("--precision", config.precision), ("--attack-precision", config.attack_precision)):
        if precision == "tf32" and not cuda:
            problems.append(f"{name} tf32 needs an NVIDIA GPU and this machine offers none: give fp32.")
        if precision == "bf16" and cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
            problems.append(f"{name} bf16: this GPU has no bfloat16 arithmetic. Give fp32.")
    return problems


def _open(
    config: EvalConfig, accelerator: Accelerator, module: nn.Module | None = None, pair: TensorPair | None = None
) -> tuple[Subject, EvalImages]:
    """The model and the images of an evaluation; ``module`` and ``pair`` stand in for those that ``config`` names."""
    subject = module_subject(module, module_name(module)) if module is not None else load_subject(config, accelerator)
    images = tensor_images(pair, config.dataset) if pair is not None else load_images(config, subject, accelerator)
    return subject, images


def _teacher(
    config: EvalConfig,
    module: nn.Module | None,
    subject: Subject,
    num_classes: int,
    images: EvalImages,
    accelerator: Accelerator,
) -> Subject | None:
    """The network to compare with: ``module``, or the one that ``config`` names.

    Raises:
        ArrestError: it cannot be had, or has other classes than the model.
    """
    if module is None:
        return load_teacher(config, subject, num_classes, accelerator, images.notes)
    teacher = module_subject(module, "teacher")
    if (count := count_classes(teacher, images, accelerator, gradients=_needs_gradients(config))) != num_classes:
        raise ConfigError(f"the teacher has {count} outputs and the model {num_classes}: give one for these classes.")
    return teacher


def _needs_gradients(config: EvalConfig) -> bool:
    return bool(config.eps_curve) or not {"noise", "square"}.issuperset(config.attack_names)


def _check_classes(config: EvalConfig, subject: Subject, images: EvalImages, accelerator: Accelerator) -> int:
    """How many classes the model has, after a look at all that an evaluation wants of it.

    Raises:
        ConfigError: the classes are not the dataset's, too few for an attack, or none can be had (see `count_classes`);
            the network cannot be folded (see `find_folding`).
    """
    num_classes = count_classes(subject, images, accelerator, gradients=_needs_gradients(config))
    if config.fold_batchnorm:
        find_folding(subject, images)
    problems = [problem for name in config.attack_names if (problem := part_problem(name, num_classes))]
    if problems:
        raise ConfigError(problems)
    if images.num_classes is not None and images.num_classes != num_classes:
        raise ConfigError(
            f"the dataset has {images.num_classes} classes and the model {num_classes} outputs: give a model that was "
            "trained on this dataset."
        )
    return num_classes


def evaluate_all(configs: Sequence[EvalConfig]) -> None:
    """Evaluate each model; several are then compared in `comparison.md` and `comparison.json`, one folder up.

    Raises:
        ArrestError: see `run_evaluation`.
    """

    def check() -> None:
        problems = [
            problem for config in configs for problem in folder_problems(config, EvalPaths(Path(config.output_dir)))
        ]
        if problems:
            raise ConfigError(list(dict.fromkeys(problems)))
        if len(configs) > 1 and (alone := EvalPaths(Path(configs[0].output_dir).parent)).config.is_file():
            raise ConfigError(
                f"--output-dir {alone.root} holds the evaluation of one model, not of several: give another."
            )
        if len(configs) > 1 and not (configs[0].overwrite or configs[0].resume):
            done = Path(configs[0].output_dir).parent / "comparison.json"
            if done.exists():
                raise ConfigError(
                    f"{done} is there already, of these or of other models: give another --output-dir, or replace it "
                    "with --overwrite."
                )

    accelerator = _accelerator()
    main_only(accelerator, check)
    if len(configs) > 1:  # what does not fit is said before the first is attacked for hours
        for config in configs:
            try:
                _check_classes(config, *_open(config, accelerator), accelerator)
            except (ConfigError, BackboneError, DataError, HubError) as error:
                raise type(error)(f"{config.model}: {error}") from error
    done = []
    for number, config in enumerate(configs, 1):
        notes = [f"\n== {number} of {len(configs)}: {config.model}"] if len(configs) > 1 else []
        done.append(run_evaluation(config, notes=notes))
    if len(configs) > 1 and PartialState().is_main_process:
        entries = [ComparedModel(name, evaluation.report, evaluation.verdicts)
                   for name, evaluation in zip(_names(configs), done, strict=True)]  # fmt: skip
        folder = Path(configs[0].output_dir).parent
        print("\n" + plain_table(entries))
        write_whole(folder / "comparison.md", comparison_markdown(entries))
        write_whole(folder / "comparison.json", comparison_json(entries))
        print(f"{folder}: comparison.md, comparison.json")


def _names(configs: Sequence[EvalConfig]) -> list[str]:
    """What to call each model beside the others: as its folder, with what was typed where two are named alike."""
    short = [evaluation_name(config.model) for config in configs]
    folders = [Path(config.output_dir).name for config in configs]
    return [
        f"{folder} ({config.model})" if short.count(name) > 1 else folder
        for folder, name, config in zip(folders, short, configs, strict=True)
    ]
