"""`finetune(config)`: check, build, train (the clean phase if asked for, then the robust one), finish."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from timm.utils import ModelEmaV3
from torch import nn

from arrest_hub.arrest import ArrestObjective
from arrest_hub.attacks import pgd, random_in_ball
from arrest_hub.backbones import Backbone, load_backbone
from arrest_hub.baselines import AdversarialTraining, StandardObjective, Trades
from arrest_hub.caller import undisturbed
from arrest_hub.card_facts import threat_tags
from arrest_hub.checkpoint import readable_progress
from arrest_hub.config import FinetuneConfig
from arrest_hub.config_sources import anchored, load_config, resume_config
from arrest_hub.corrupt import CorruptImages, read_entries
from arrest_hub.errors import ConfigError
from arrest_hub.estimate import choose_batch_size
from arrest_hub.finish import RunDir, finish_run
from arrest_hub.hub import check_push, run_push
from arrest_hub.loop import TrainingPhase
from arrest_hub.machine import bf16_warning
from arrest_hub.model_arguments import DROPPED
from arrest_hub.network_options import (
    checkpoint_gradients,
    freeze_head,
    keep_first_convolution_in_fp32,
    miscomputed_on_cpus,
    synchronise_batchnorm,
    use_channels_last,
)
from arrest_hub.objective import Objective
from arrest_hub.plan import describe_plan
from arrest_hub.prepare import (
    describe_run,
    environment_problems,
    launcher_warning,
    make_accelerator,
    num_workers,
    prepare_data,
    prepare_student,
)
from arrest_hub.processes import agree, from_main, main_only
from arrest_hub.progress import Log
from arrest_hub.provenance import base_for_run
from arrest_hub.push_config import PushConfig
from arrest_hub.resume import check_origins, dataset_origin, model_origin
from arrest_hub.run import Run
from arrest_hub.run_folder import RunPaths, hold_run_folder, output_dir_problems
from arrest_hub.sample_eps import eps_by_sensitivity
from arrest_hub.schedule import check_accumulation, length_problems
from arrest_hub.sharding import is_sharded
from arrest_hub.step import choose_images_at_once, gradient_scale, make_teacher
from arrest_hub.training_record import BaseModel


def build_objective(
    config: FinetuneConfig,
    teacher: nn.Module | None,
    *,
    static_shapes: bool = False,
    images_at_once: int | None = None,
) -> Objective:
    """The configured method as an objective; the one place where configuration becomes maths.

    ``images_at_once``: what `choose_images_at_once` chose; default: the configuration's.
    """
    numbers: dict[str, Any] = {"norm": config.norm, "eps": config.eps_train_value}
    scale = gradient_scale(config)
    step_size = None if config.attack_step_size is None else config.step_size_value  # None: suits a schedule of steps
    attacked: dict[str, Any] = {"step_size": step_size, "gradient_scale": scale}
    attacked["images_at_once"] = images_at_once or config.images_at_once
    smoothing = config.label_smoothing
    objective: Objective
    if config.method == "trades":
        objective = Trades(
            beta=config.trades_beta, steps=config.attack_steps, label_smoothing=smoothing, **numbers, **attacked
        )
        return _counted(config, objective)
    radii = partial(eps_by_sensitivity, spread=config.eps_spread, gradient_scale=scale, **numbers)
    shared: dict[str, Any] = {"attack_steps": config.attack_steps, "label_smoothing": smoothing}
    shared["radii"] = radii if config.eps_spread else None
    attack = partial(pgd, **numbers, **attacked, stop_after=config.attack_stop_after, static_shapes=static_shapes)
    if config.method == "at":
        return _counted(config, AdversarialTraining(attack, **shared))
    objective = ArrestObjective(
        teacher,
        attack,
        partial(random_in_ball, **numbers),
        rgkd_weight=config.rgkd_weight,
        replay_threshold=config.replay_threshold,
        rgkd_input=config.rgkd_input,
        replay_by=config.replay_by,
        replay_with=config.replay_with,
        static_shapes=static_shapes,
        **shared,
    )
    return _counted(config, objective)


def _counted(config: FinetuneConfig, objective: Objective) -> Objective:
    """The same, with the pass that --awp-gamma takes among its passes."""
    if config.awp_gamma:
        objective.passes["perturbation"] = objective.passes["training"]
    return objective


@undisturbed()
def finetune(config: FinetuneConfig, notes: Sequence[str] = ()) -> RunDir:
    """Make a pretrained classifier robust: check, train, export, evaluate the export, write results and card.

    ``notes`` are printed first. Runs on one process or under `accelerate launch` on many. A run that is resumed must
    have the values it began with (`config.RESUME_MAY_DIFFER` may be others). The global random states
    of torch, numpy and Python, and the caller's own Accelerator, are afterwards what they were.

    Raises:
        ArrestError: (ConfigError, BackboneError, DataError, HubError) for anything wrong with the input, before the
            first step and with nothing overwritten; later, for an image that cannot be read, training that diverges,
            a checkpoint that cannot be written, or a push that fails. Terminated after a SIGTERM or Ctrl-C, with a
            checkpoint written. AlreadyReported in other processes than the main one.
        OSError: the log or the export cannot be written, as on a full disk.
    """
    _check_kind(config)
    if config.dry_run:
        raise ConfigError("dry_run=True is for the command: call arrest_hub.dry_run(config), which trains nothing.")
    run, backbone, base = _prepare(config, notes)
    with hold_run_folder(run.config, run.paths, run.accelerator):
        return _train(run, backbone, base)


@undisturbed()
def dry_run(config: FinetuneConfig, notes: Sequence[str] = ()) -> list[str]:
    """Do what comes before the training of `finetune`, and a few steps; print, and return, what the rest will take.

    Writes nothing. Raises as `finetune` does.
    """
    _check_kind(config)
    run, backbone, _ = _prepare(dataclasses.replace(config, push_to_hub=None, private=False, dry_run=True), notes)
    lines = describe_plan(run, backbone, partial(_costly_objective, run))
    for line in lines:
        run.accelerator.print(line)
    return lines


def _check_kind(config: FinetuneConfig) -> None:
    if not isinstance(config, FinetuneConfig):
        raise ConfigError(f"config is a {type(config).__name__}: give a FinetuneConfig(model=..., dataset=...).")
    if isinstance(config.model, nn.Module):
        raise ConfigError(
            f"model is a {type(config.model).__name__}, and a run begins from a folder: save the network with timm's "
            "save_for_hf(..., safe_serialization=True) or transformers' save_pretrained, and give that."
        )


def _objective(run: Run, teacher: nn.Module | None) -> Objective:
    """The objective of the robust phase."""
    static_shapes = run.config.compile or is_sharded(run.accelerator)
    return build_objective(run.config, teacher, static_shapes=static_shapes, images_at_once=run.images_at_once)


def _costly_objective(run: Run, teacher: nn.Module | None) -> Objective:
    """The same, attacking every image to the end: noisy replay and --attack-stop-after spare some of it; with as many
    steps as the attack has on average."""
    objective = build_objective(run.config, teacher, static_shapes=True, images_at_once=run.images_at_once)
    objective.attack_steps = round((run.config.attack_steps_at(0.0) + run.config.attack_steps) / 2)
    return objective


def _prepare(config: FinetuneConfig, notes: Sequence[str]) -> tuple[Run, Backbone, BaseModel | None]:
    """Everything before the run folder is written: checks, data, network, and what is about to happen, printed."""
    config = dataclasses.replace(config).validate()
    paths = RunPaths(Path(config.output_dir))
    if config.resume and paths.config.is_file():
        values = dataclasses.asdict(config)
        del values["recipe"]  # a name; what it stands for is in the others
        config = resume_config(load_config(paths.config), values)
    problems = environment_problems(config) + output_dir_problems(config, paths)
    if problems:
        raise ConfigError(problems)
    config = anchored(config)
    accelerator = make_accelerator(config, paths)
    warnings = [launcher_warning(accelerator, "finetune")]
    warnings += [bf16_warning(accelerator, "--mixed-precision no")] if config.mixed_precision == "bf16" else []
    for note in (*notes, *filter(None, warnings)):
        accelerator.print(note)
    if (asked := os.environ.get("ACCELERATE_MIXED_PRECISION", "no")) not in ("no", config.mixed_precision):
        accelerator.print(
            f"note        the launcher's mixed precision, {asked}, is not used: --mixed-precision decides"
        )
    if is_sharded(accelerator) and config.channels_last:
        config.channels_last = False
        accelerator.print("note        --channels-last is off: FSDP shards no weights whose channels are innermost")
    if config.push_to_hub:  # whoever may not publish learns it before the training, not after
        push_config = push_after(config)
        threat = threat_tags(config.norm, config.eps)[-1]
        main_only(accelerator, lambda: check_push(push_config, accelerator.print, threat))
    splits = prepare_data(config, accelerator)
    backbone, head_note = prepare_student(config, splits, accelerator)
    if config.push_to_hub:  # again, for only now the architecture is known
        network = backbone.source.architecture
        main_only(accelerator, lambda: check_push(push_config, lambda _: None, threat, network))
    if config.channels_last and accelerator.device.type == "cpu" and (narrow := miscomputed_on_cpus(backbone)):
        config.channels_last = False
        accelerator.print(
            f"note        --channels-last is off: on a CPU the gradient of {narrow} would be wrong (oneDNN issue 6035)"
        )
    set_options(config, backbone)
    facts = main_only(accelerator, lambda: base_for_run(config, backbone.source))
    base, base_note = facts or (None, None)
    origins = model_origin(backbone.source), dataset_origin(splits)
    agree(
        accelerator,
        {"weights to begin with": origins[0], "training images": (splits.train.num_examples, origins[1])},
        "give all machines the same files.",
    )
    run = Run(
        config=config,
        paths=paths,
        accelerator=accelerator,
        splits=splits,
        log=Log(paths.log, accelerator),
        num_workers=num_workers(config.num_workers, accelerator, streaming=config.streaming),
        model_origin=origins[0],
        dataset_origin=origins[1],
        images_at_once=choose_images_at_once(config, backbone, accelerator.device),
        corrupt=CorruptImages(config.skip_corrupt, read_entries(paths.corrupt) if config.resume else []),
    )
    if config.resume:
        check_origins(paths.checkpoints, run.model_origin, run.dataset_origin)
    if config.batch_size == "auto":
        config.batch_size = choose_batch_size(
            config, accelerator, backbone, partial(_costly_objective, run), splits.train.num_examples
        )
        accelerator.print(f"--batch-size auto: {config.batch_size}")
        if problems := length_problems(config, splits.train.num_examples, accelerator.num_processes):
            raise ConfigError(problems)
    if splits.train.num_examples is not None:  # a stream's loader processes may take a batch less, and are asked again
        batches = splits.train.num_examples // (config.batch_size * accelerator.num_processes)
        check_accumulation(config.grad_accum_steps, batches)
    passes = build_objective(config, backbone).passes
    for line in describe_run(config, paths, accelerator, splits, backbone, head_note, passes):
        accelerator.print(line)
    if base_note:
        accelerator.print(f"note        {base_note}")
    if config.resume and not paths.has_work:
        accelerator.print(f"resume      there is no checkpoint in {paths.root} yet: starting from the beginning")
    return run, backbone, base


def _train(run: Run, backbone: Backbone, base: BaseModel | None) -> RunDir:
    """The phases of a run whose folder is held, and its end."""
    config, paths, accelerator = run.config, run.paths, run.accelerator
    if config.log_with:
        values = {
            key: value for key, value in dataclasses.asdict(config).items() if isinstance(value, (int, float, str))
        }
        main_only(accelerator, lambda: accelerator.init_trackers("arrest-hub", config=values))

    if config.standard_epochs:
        if config.compile:
            backbone.compile()
        backbone = standard_phase(run, backbone)
    set_options(config, backbone)
    teacher = make_teacher(config, backbone, accelerator.device)
    student = _initial_student(run, backbone)
    set_options(config, student)
    if config.freeze_head:
        freeze_head(student)
    if not is_sharded(accelerator):  # otherwise a part of it is moved, by the one that shards it
        student.to(accelerator.device)
    set_seed(config.seed)
    ema = ModelEmaV3(student, decay=config.ema_decay) if config.ema_decay else None
    if config.compile:
        student.compile()
        if ema is not None:
            ema.module.compile()
    objective = _objective(run, teacher)
    progress = TrainingPhase(
        run, "robust", student, objective, epochs=config.epochs, lr=config.lr, max_steps=config.max_steps, ema=ema
    ).train()
    exported = run.whole(ema.module if ema is not None else student)
    source = backbone.source
    finished = finish_run(
        config, paths, accelerator, run.splits, exported, progress=progress, num_workers=run.num_workers,
        teacher_id=(source.pinned_id or source.model_id) if source.pretrained else None, base=base,
    )  # fmt: skip
    if config.push_to_hub and accelerator.is_main_process:  # the others need not wait for it
        finished.pushed = run_push(push_after(config), print)
    return finished


def set_options(config: FinetuneConfig, network: Backbone) -> None:
    """Switch on in a network what the configuration asks for; again has no effect.

    Raises:
        BackboneError: the network does not offer it.
    """
    if config.channels_last:
        use_channels_last(network)
    if config.grad_checkpointing:
        checkpoint_gradients(network)
    if config.sync_bn:
        synchronise_batchnorm(network)
    if config.mixed_precision == "fp16":
        keep_first_convolution_in_fp32(network)


def push_after(config: FinetuneConfig) -> PushConfig:
    """The push that --push-to-hub asks for."""
    return PushConfig(
        folder=config.output_dir, repo_id=config.push_to_hub, private=config.private, license=config.license,
        license_name=config.license_name, license_link=config.license_link,
    ).validate()  # fmt: skip


def standard_phase(run: Run, backbone: Backbone) -> Backbone:
    """Finetune on clean images, keep the result in `teacher/` and return it reloaded from there.

    Skipped if a resumed run has `teacher/` already: the folder is written whole or not at all.
    """
    config, accelerator = run.config, run.accelerator
    if not from_main(accelerator, run.paths.teacher.is_dir):
        TrainingPhase(
            run, "standard", backbone, StandardObjective(), epochs=config.standard_epochs,
            lr=config.standard_lr or config.lr, max_steps=None, ema=None,
        ).train()  # fmt: skip
        run.write(backbone, run.paths.teacher)
        accelerator.free_memory()
    elif done := readable_progress(run.paths.checkpoints, "standard"):
        run.images_logged = done[-1].images
    return load_backbone(str(run.paths.teacher), model_args=_dropped(config))


def _dropped(config: FinetuneConfig) -> dict[str, Any]:
    """Of the model's arguments those that a folder of ours does not tell: what is dropped in training."""
    return {name: value for name, value in config.model_args.items() if name in DROPPED}


def _initial_student(run: Run, backbone: Backbone) -> Backbone:
    """The student before robust finetuning: the standardly pretrained network, or its architecture at random."""
    if run.config.init == "pretrained" or not (run.config.standard_epochs or backbone.source.pretrained):
        return backbone
    set_seed(run.config.seed)
    model = str(run.paths.teacher) if run.config.standard_epochs else run.config.model
    student = load_backbone(
        model, pretrained=False, image_size=run.config.image_size, num_classes=backbone.num_classes,
        model_args=_dropped(run.config) if run.config.standard_epochs else run.config.model_args,
    )  # fmt: skip
    student.label_names = backbone.label_names
    return student
