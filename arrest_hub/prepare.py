"""Everything that is checked and built before the first step: precision, output folder, data, label space, student.

Bad input ends here, with one clear error, before anything is written.
"""

from __future__ import annotations

import os
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DataLoaderConfiguration,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    gather_object,
    is_tensorboard_available,
    is_trackio_available,
    is_wandb_available,
    set_seed,
)
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

from arrest_hub.backbones import Backbone, load_backbone
from arrest_hub.config import FinetuneConfig
from arrest_hub.data import ImageSplit, Splits, load_splits
from arrest_hub.errors import ConfigError, did_you_mean
from arrest_hub.fields import flag, small_radius
from arrest_hub.labels import ReorderedClasses, match_labels
from arrest_hub.network_options import compile_problem
from arrest_hub.processes import main_first, processes_here
from arrest_hub.run_folder import RunPaths
from arrest_hub.schedule import length_problems
from arrest_hub.sharding import is_sharded, set_up_sharding, wants_sharding


def optimizer_problem(name: str) -> str | None:
    """A line for an optimizer that timm does not know, with the nearest that it does, or that takes no step here: some
    want another package, a GPU, or second derivatives."""
    known = [str(optimizer) for optimizer in list_optimizers()]
    if name not in known:
        return f"--optimizer {name!r} is not one of timm's.{did_you_mean(name, known)}"
    why = _no_step(name, "cpu")
    if why is not None and _uses_cuda():  # not before: each process would take memory of a GPU
        why = _no_step(name, _own_device())
    if why is None:
        return None
    return f"--optimizer {name} does not work here ({why}): give another, such as sgd, adamw or lion."


def _uses_cuda() -> bool:
    return torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() not in ("1", "true")


def _own_device() -> str:
    """The device that this process will have: on any other it would take memory of another process's GPU."""
    if not _uses_cuda():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


def _no_step(name: str, device: str) -> str | None:
    """Why an optimizer takes no step with a layer on a device; None: it does."""
    try:
        layer = nn.Linear(2, 2, device=device)
        optimizer = create_optimizer_v2(layer, opt=name, lr=1e-3)
        layer(torch.ones(1, 2, device=device)).sum().backward()
        optimizer.step()
    except Exception as error:  # they fail in as many ways as there are
        return " ".join(str(error).split())[:200] or type(error).__name__
    return None


def environment_problems(config: FinetuneConfig) -> list[str]:
    """What this machine cannot do of the configuration: optimizer, precision, tracker. A line for each."""
    cuda = _uses_cuda()
    found = [optimizer_problem(config.optimizer), compile_problem(_own_device()) if config.compile else None]
    problems = [problem for problem in found if problem]
    if config.mixed_precision == "fp16" and not cuda:
        problems.append("--mixed-precision fp16 needs a GPU and this machine offers none: give no or bf16.")
    if config.mixed_precision == "bf16" and cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        problems.append("--mixed-precision bf16: this GPU has no bfloat16 arithmetic. Give fp16 or no.")
    if config.sync_bn and not cuda:
        problems.append(
            "--sync-bn needs GPUs: PyTorch has no synchronised BatchNorm for CPUs. Leave it out; running statistics "
            "are the mean over the processes without it too."
        )
    if config.compile and wants_sharding():
        problems.append(
            "--compile with FSDP: the gathering of the weights would be compiled in, which is not tested here. Give "
            "one of them."
        )
    available = {
        "tensorboard": is_tensorboard_available,
        "wandb": is_wandb_available,
        "trackio": is_trackio_available,
    }
    if config.log_with and not available[config.log_with]():
        problems.append(f"--log-with {config.log_with} is not installed: pip install {config.log_with}")
    if wants_sharding() and config.ema_decay:
        problems.append(
            f"--ema-decay {config.ema_decay}: the weights of a network that is sharded (FSDP) are not averaged. Leave "
            "it out, or launch without FSDP."
        )
    if wants_sharding() and config.awp_gamma:
        problems.append(
            f"--awp-gamma {config.awp_gamma:g}: the weights of a network that is sharded (FSDP) are not perturbed. "
            "Leave it out, or launch without FSDP."
        )
    return problems


def make_accelerator(config: FinetuneConfig, paths: RunPaths) -> Accelerator:
    """The Accelerator of a run. Raises ConfigError: see `new_accelerator`."""
    return new_accelerator(
        config.ddp_timeout,
        mixed_precision=config.mixed_precision,
        # as a plugin: the number alone gives way to ACCELERATE_GRADIENT_ACCUMULATION_STEPS
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.grad_accum_steps),
        log_with=config.log_with,
        project_dir=str(paths.root),
    )


def new_accelerator(timeout: int = 1800, **options: Any) -> Accelerator:
    """An Accelerator with these options, also where the process had one with others before.

    ``timeout``: seconds after which a process gives up waiting for the others.

    Raises:
        ConfigError: several processes were launched and do not find each other, or the network is to be sharded.
    """
    AcceleratorState._reset_state()
    # Accelerate joins CPU processes to one run only if it is told that they are to use the CPU
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=timeout))],
        # from pinned memory; a copy that blocks would wait for the whole step before it
        dataloader_config=DataLoaderConfiguration(non_blocking=torch.cuda.is_available()),
        **options,
    )
    set_up_sharding(accelerator)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise ConfigError(
            f"{launched} processes were launched (WORLD_SIZE) and Accelerate joined {accelerator.num_processes}: "
            "start them with torchrun or `accelerate launch`."
        )
    return accelerator


def launcher_warning(accelerator: Accelerator, command: str) -> str | None:
    """A sentence for the case that `accelerate launch` was asked for several processes and started one.

    It does so on a CPU without MPI: it sets the address of a main process, and no rank.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
    if accelerator.num_processes > 1 or not launched or "RANK" in os.environ:
        return None
    return (
        "warning: `accelerate launch` was asked for several processes and started ONE, as it does on a CPU without "
        f"MPI. For several CPU processes: torchrun --nproc_per_node N -m arrest_hub {command} ..."
    )


def num_workers(wanted: int | None, accelerator: Accelerator, *, streaming: bool = False) -> int:
    """Loader processes: as many as wanted, else the cores of this machine's process less one, at most 8.

    Of a stream, which its readers share out by how many they are, as many in every process: the fewest.
    """
    if wanted is not None:
        return wanted
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    chosen = max(0, min(8, cores // processes_here(accelerator) - 1))
    return min(gather_object([chosen])) if streaming else chosen


def prepare_data(config: FinetuneConfig, accelerator: Accelerator) -> Splits:
    """Load the splits, the main process first so that a download happens once.

    Raises:
        DataError, HubError: see `data.load_splits`. ConfigError: batch larger than the training split, or a length
            that does not fit it (see `length_problems`).
    """
    load = partial(
        load_splits,
        config.dataset,
        image_column=config.image_column,
        label_column=config.label_column,
        train_split=config.train_split,
        eval_split=config.eval_split,
        validation_size=config.validation_size,
        limit_train=config.limit_train,
        limit_eval=config.limit_eval,
        seed=config.seed,
        streaming=config.streaming,
    )
    splits = main_first(accelerator, load)
    size = splits.train.num_examples
    chosen = config.batch_size != "auto"  # otherwise it is at most what there is
    if size is not None and chosen and config.batch_size * accelerator.num_processes > size:
        each = f" on each of {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
        most = size // accelerator.num_processes
        raise ConfigError(
            f"--batch-size {config.batch_size}{each} is larger than the training split of {size} images: "
            + (f"give at most {most}." if most > 1 else "a batch has two images or more, so use fewer processes.")
        )
    problems = length_problems(config, size, accelerator.num_processes)
    if problems:
        raise ConfigError(problems)
    return splits


def prepare_student(config: FinetuneConfig, splits: Splits, accelerator: Accelerator) -> tuple[Backbone, str]:
    """The pretrained network with a head that fits the dataset, and a sentence about its label space.

    A head that does not fit is replaced, and one put on where there is none, only if `--standard-epochs` will train it.
    Sets the splits' label maps.

    Raises:
        BackboneError, HubError: see `backbones.load_backbone`. ConfigError: the label spaces differ, or a random
            initialisation would be taken for a standardly pretrained network.
    """
    set_seed(config.seed)
    load = partial(
        load_backbone,
        config.model,
        head_if_none=splits.num_classes if config.standard_epochs else None,
        image_size=config.image_size,
        model_args=config.model_args or None,
        allow_pickle=config.allow_pickle,
    )
    backbone = main_first(accelerator, load)
    names: list[str] | int = splits.class_names or splits.num_classes
    random_start = not backbone.source.pretrained
    if random_start:
        if not config.standard_epochs and (config.needs_teacher or config.init == "pretrained"):
            raise ConfigError(
                f"--model {config.model} is an architecture without weights, so there is no standardly pretrained "
                "network to start from: add --standard-epochs N to train one first, or name a pretrained model. "
                "(--method at and trades also run from --init random.)"
            )
        backbone.reset_head(names)
        return backbone, f"head: new, {backbone.num_classes} classes"
    if backbone.new_head:
        backbone.label_names = splits.class_names
        return backbone, f"head: new, {backbone.num_classes} classes (the model had none)"
    try:
        match = match_labels(
            splits.class_names, splits.num_classes, backbone.label_names, backbone.num_classes, mode=config.label_match
        )
    except ReorderedClasses:  # no reason to throw the head away
        raise
    except ConfigError:
        if not config.standard_epochs:
            raise
        old = backbone.num_classes
        backbone.reset_head(names)
        return (
            backbone,
            f"head: new, {backbone.num_classes} classes (the model's own had {old}, of other names or number)",
        )
    if match.order is not None:
        for split in distinct_splits(splits):
            split.label_map = match.order
    if backbone.label_names is None and splits.class_names is not None:
        backbone.label_names = list(splits.class_names)
    return backbone, f"head: kept, {backbone.num_classes} classes" + (f"; {match.note}" if match.note else "")


def distinct_splits(splits: Splits) -> list[ImageSplit]:
    """Train, validation (if any) and test."""
    return [split for split in (splits.train, splits.validation, splits.test) if split is not None]


def plural(count: int, noun: str) -> str:
    """``1 epoch``, ``2 epochs``, ``2 processes``."""
    return f"{count:,} {noun}" + ("" if count == 1 else "es" if noun.endswith("s") else "s")


def _planned_length(config: FinetuneConfig, splits: Splits, processes: int) -> str:
    """``50 steps (10 epochs)``: what ends first, of --max-steps and --epochs."""
    steps = planned_steps(config, splits.train.num_examples, processes)
    if splits.train.num_examples is None:
        return plural(steps, "step")
    return f"{plural(steps, 'step')} " + (
        "(--max-steps)" if steps == config.max_steps else f"({plural(config.epochs, 'epoch')})"
    )


def planned_steps(config: FinetuneConfig, num_examples: int | None, processes: int) -> int:
    """Optimizer steps of the robust phase; ``num_examples`` is None for a stream of unknown length."""
    if num_examples is None:
        return config.max_steps or 0
    steps = config.epochs * (num_examples // config.batch_size // processes // config.grad_accum_steps)
    return steps if config.max_steps is None else min(steps, config.max_steps)


def _schedule(config: FinetuneConfig) -> str:
    """``cosine to 0.0001, 0.5 epochs of warm-up``."""
    end = f" to {config.min_lr:g}" if config.scheduler in ("cosine", "poly") and config.min_lr else ""
    warmup = f", {config.warmup_epochs:g} epochs of warm-up" if config.warmup_epochs else ""
    return f"{config.scheduler}{end}{warmup}"


def _ingredients(config: FinetuneConfig) -> str:
    """What is beside the method, as in ``, averaged (0.995) from epoch 2``; nothing by default."""
    choices = {"augment": "none"}
    if config.method == "arrest" and config.replay_threshold is not None:
        choices = {"replay_by": "sample", "replay_with": "noise"} | choices
    if config.method == "arrest" and config.rgkd_weight:
        choices = {"rgkd_input": "adversarial"} | choices
    parts = [f"{flag(name)[2:]} {getattr(config, name)}" for name in choices if getattr(config, name) != choices[name]]
    numbers = ("random_erasing", "awp_gamma", "label_smoothing", "lr_hold")
    parts += [f"{flag(name)[2:]} {getattr(config, name):g}" for name in numbers if getattr(config, name)]
    if config.ema_decay:
        start = f" from epoch {config.ema_start_epoch:g}" if config.ema_start_epoch else ""
        parts.append(f"averaged weights ({config.ema_decay:g}{start})")
    parts += ["frozen head"] if config.freeze_head else []
    return "".join(f", {part}" for part in parts)


def describe_run(
    config: FinetuneConfig,
    paths: RunPaths,
    accelerator: Accelerator,
    splits: Splits,
    backbone: Backbone,
    head_note: str,
    passes: dict[str, int],
) -> list[str]:
    """What is about to happen, a line a subject."""
    source, size = backbone.source, backbone.preprocessing.size
    parameters = sum(parameter.numel() for parameter in backbone.parameters())
    revision = f" @ {source.revision[:12]}" if source.revision else ""
    data_revision = f" @ {splits.revision[:12]}" if splits.revision else ""
    weights = "pretrained" if source.pretrained else "random initialisation"
    if not config.needs_teacher:
        teacher = f"none used by {config.method}" if config.method != "arrest" else "none used (RGKD and NR are off)"
    elif config.standard_epochs:
        teacher = f"this network after {plural(config.standard_epochs, 'epoch')} of clean training, frozen"
    else:
        teacher = "the same pretrained weights, frozen"
    counts = [f"{split.num_examples:,} {role}" if split.num_examples is not None else f"unknown number of {role}"
              for role, split in (("training", splits.train), ("validation", splits.validation), ("test", splits.test))
              if split is not None]  # fmt: skip
    method = config.method
    if method == "arrest":
        tau = "off" if config.replay_threshold is None else f"{config.replay_threshold:g}"
        method += f", lambda {config.rgkd_weight:g}, replay threshold {tau}"
    elif method == "trades":
        method += f", beta {config.trades_beta:g}"
    method += _ingredients(config)
    length = _planned_length(config, splits, accelerator.num_processes)
    total = config.batch_size * accelerator.num_processes * config.grad_accum_steps
    switches = ("channels_last", "fold_batchnorm", "compile", "grad_checkpointing", "sync_bn")
    options = "".join(f", {flag(name)[2:]}" for name in switches if getattr(config, name))
    options += ", sharded (FSDP2)" * is_sharded(accelerator)
    arguments = "".join(f", {name}={value}" for name, value in config.model_args.items())
    attack = f"PGD-{config.attack_steps}, step {config.step_size_value:.5f}"
    if config.attack_steps_start is not None:
        attack = f"PGD-{config.attack_steps_start} at the start, growing to {attack}"
    if config.eps_train is not None:
        attack = f"in training eps {config.eps_train}; {attack}"
    if config.eps_spread:
        attack += f", eps of each image within {config.eps_spread:.0%} of it"
    if config.attack_stop_after is not None:
        attack += f", until {plural(config.attack_stop_after, 'step')} after an image is misclassified"
    return [
        f"model       {source.model_id}{revision} ({source.library} {source.architecture}, {parameters / 1e6:.2f} M "
        f"parameters, {size[0]}x{size[1]} px, {weights}{arguments})",
        f"            {head_note}",
        f"teacher     {teacher}",
        f"data        {splits.dataset_id}{data_revision}: {', '.join(counts)} images, {splits.num_classes} classes",
        *[f"            {note}" for note in splits.notes],
        f"threat      {config.norm}, eps {config.eps}{small_radius(config.norm, config.eps)}; {attack}",
        f"method      {method}; student's initialisation: {config.init}",
        f"passes      per image and step: {', '.join(f'{count} {name}' for name, count in passes.items())}",
        f"training    {length}, batch {config.batch_size} x {plural(accelerator.num_processes, 'process')} x "
        f"{config.grad_accum_steps} accumulated = {total}, {config.optimizer}, lr {config.lr:g} "
        f"({_schedule(config)}), precision {config.mixed_precision}{options}, {accelerator.device.type}",
        f"output      {paths.root}",
    ]
