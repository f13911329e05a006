"""`--dry-run`: what a run will take, said before it begins."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

from torch import nn

from arrest_hub.backbones import Backbone
from arrest_hub.baselines import StandardObjective
from arrest_hub.data_speed import loader_images_per_second
from arrest_hub.epoch_batches import training_batches
from arrest_hub.errors import ConfigError
from arrest_hub.estimate import Cost, choose_batch_size, measure_evaluation, measure_steps, memory_limit
from arrest_hub.finish import evaluation_batch
from arrest_hub.objective import Objective
from arrest_hub.prepare import planned_steps, plural
from arrest_hub.run import Run
from arrest_hub.sharding import is_sharded
from arrest_hub.step import validation_attack

STEPS = 3
DATA_SECONDS = 2.0
EVALUATED = 16
"""Images of the batch by which an evaluation is timed on a CPU. A GPU would take as long for a whole one."""


def describe_plan(run: Run, network: Backbone, build_objective: Callable[[nn.Module | None], Objective]) -> list[str]:
    """Run a few steps and say what the whole will take, a line a subject. Writes nothing. Every process must call it.

    Raises what the device raises when a step does not fit in its memory.
    """
    config, accelerator, splits = run.config, run.accelerator, run.splits
    processes, device = accelerator.num_processes, accelerator.device
    cost = measure_steps(config, accelerator, network, build_objective, config.batch_size, steps=STEPS)
    loader = training_batches(run, network, run.num_workers)
    try:
        data = loader_images_per_second(loader, seconds=DATA_SECONDS) * processes
    except ValueError:
        data = None
    del loader
    images = config.batch_size * processes
    training = images / cost.median
    pace = training if data is None else min(training, data)

    steps = planned_steps(config, splits.train.num_examples, processes)
    batches = steps * config.grad_accum_steps
    parts = {"training": (batches * images / pace, plural(steps, "step"))}
    if config.standard_epochs and splits.train.num_examples:
        standard = measure_steps(
            config, accelerator, network, lambda teacher: StandardObjective(), config.batch_size, steps=STEPS,
        )  # fmt: skip
        of_clean = config.standard_epochs * (splits.train.num_examples // images) * standard.median
        parts["clean phase"] = (of_clean, plural(config.standard_epochs, "epoch"))
    settings = validation_attack(config, run.images_at_once)
    final = settings._replace(steps=config.eval_attack_steps, images_at_once=None, gradient_scale=1.0)
    evaluated = min(EVALUATED, config.batch_size)
    if device.type != "cpu" and not is_sharded(accelerator):
        evaluated = evaluation_batch(copy.deepcopy(network).to(device), config.batch_size, accelerator)
    if not is_sharded(accelerator):  # the network evaluated would have to be gathered first
        if splits.validation is not None and config.eval_every:
            each = measure_evaluation(accelerator, network, evaluated, settings, config)
            an_epoch = (splits.train.num_examples or 0) // images // config.grad_accum_steps  # 0: not known
            epochs = math.ceil(steps / an_epoch) if an_epoch else 1
            times = math.ceil(epochs / config.eval_every)  # the last epoch is always followed by one
            count = splits.validation.num_examples or 0
            parts["validation"] = (times * count * each / processes, f"{times} x {plural(count, 'image')}")
        if splits.test.num_examples:
            each = measure_evaluation(accelerator, network, evaluated, final)
            networks = 2 if network.source.pretrained or config.standard_epochs else 1
            count = splits.test.num_examples
            what = f"{plural(count, 'image')}, clean and PGD-{config.eval_attack_steps}" + ", and the teacher's" * (
                networks - 1
            )
            parts["evaluation"] = (networks * count * each / processes, what)

    weights = sum(value.numel() * value.element_size() for value in network.state_dict().values())
    checkpoint = weights * (2 if config.ema_decay else 1) + cost.optimizer_state
    lines = [
        f"estimate    from {plural(STEPS, 'step')} of {config.batch_size} random images"
        f"{f' on each of {processes} processes' if processes > 1 else ''}: {cost.median:.3g} s "
        f"({min(cost.seconds):.3g} to {max(cost.seconds):.3g}), {training:,.0f} images/s",
        "memory      " + _memory(cost, memory_limit(run.accelerator), device.type),
        "data        " + _data(data, training, run.num_workers),
        *(f"{name:<12}{_duration(seconds)} ({what})" for name, (seconds, what) in parts.items()),
        f"in all      {_duration(sum(seconds for seconds, _ in parts.values()))}",
        f"disk        {_bytes(checkpoint)} a checkpoint, up to {config.keep_checkpoints + 1} kept; {_bytes(weights)} "
        "the weights",
    ]
    try:
        best = choose_batch_size(config, accelerator, network, build_objective, splits.train.num_examples)
        lines.append(f"batch       --batch-size auto would take {best} in each process")
    except ConfigError as error:
        lines.append(f"batch       {error}")
    return [*lines, "nothing was written (--dry-run)"]


def _memory(cost: Cost, limit: int, device: str) -> str:
    state = f"{_bytes(cost.optimizer_state)} of optimizer state"
    if cost.peak is None:
        return f"not measured on this system; {state}"
    where = "on each GPU" if device == "cuda" else "in each process"
    return f"{_bytes(cost.peak)} {where} at the peak of a step, with {state}; {_bytes(limit)} can be had"


def _data(data: float | None, training: float, workers: int) -> str:
    if data is None:
        return "not measured: an epoch has fewer than two batches"
    verdict = "enough" if data >= training else "TOO SLOW: training will wait for it, give more --num-workers"
    return f"{data:,.0f} images/s without training, with {plural(workers, 'worker')} a process: {verdict}"


def _bytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    """``45 s``, ``3.2 min``, ``12.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
