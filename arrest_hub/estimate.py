"""What a run will take, from a few of its steps on this machine: memory, hours, the batch that fits."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import release_memory
from torch import nn

from arrest_hub.backbones import Backbone
from arrest_hub.config import FinetuneConfig
from arrest_hub.errors import ConfigError
from arrest_hub.network_options import freeze_head, normalise_alone
from arrest_hub.objective import Objective
from arrest_hub.out_of_memory import is_out_of_memory
from arrest_hub.processes import any_process, processes_here
from arrest_hub.sharding import choose_blocks, is_sharded
from arrest_hub.step import (
    attacked_network,
    for_eval_passes,
    make_optimizer,
    make_perturbation,
    make_teacher,
    train_step,
)
from arrest_hub.validation import PgdSettings, count_correct

MARGIN = 0.9
"""Of the memory: what is left over is for fragments and for other images."""
CPU_MARGIN = 0.5
MOST = {"cuda": 1024, "cpu": 128}
"""Images of a batch that is chosen: a larger one changes how a network learns more than it saves time."""


@dataclass(frozen=True)
class Cost:
    """Of training steps of one batch in each process: seconds of each, the peak of memory in bytes (None: not measured
    here), and the bytes of the optimizer's state."""

    seconds: list[float]
    peak: int | None
    optimizer_state: int = 0

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.seconds)


def idle_optimizer(config: FinetuneConfig, student: nn.Module) -> torch.optim.Optimizer:
    """The configured optimizer, which does its work and changes nothing: its learning rate is 0.

    One next to nothing would not do: weights that begin at 0, as the last BatchNorm's of a block, would become so small
    that gradients behind them are denormal numbers, which a CPU may take ten times as long to compute with.
    """
    optimizer = make_optimizer(config, student, 1e-12)  # some refuse to begin with 0
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    return optimizer


class Rehearsal:
    """What a run would train, on random images: a copy of ``network`` on the device, and all that its steps take.

    ``build_objective`` makes the objective for a teacher. Without the exchange of gradients between processes, unless
    the network is sharded. It learns nothing, so that it stays the network that it is.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        accelerator: Accelerator,
        network: Backbone,
        build_objective: Callable[[nn.Module | None], Objective],
        batch_size: int,
    ) -> None:
        self.config, self.accelerator = config, accelerator
        device = accelerator.device
        self.student = copy.deepcopy(network)
        if config.freeze_head:
            freeze_head(self.student)
        self.teacher = make_teacher(config, network, device)
        self.objective = build_objective(self.teacher)
        self.optimizer = idle_optimizer(config, self.student)
        self.model: nn.Module = self.student
        if is_sharded(accelerator):
            choose_blocks(accelerator, self.student)
            self.model, self.optimizer = accelerator.prepare(self.student, self.optimizer)
        else:
            self.student.to(device)
        if config.compile:
            self.student.compile()
        self.attacked = attacked_network(config, accelerator, self.student, self.objective)
        self.perturbation = None
        if "attack" in self.objective.passes:
            self.perturbation = make_perturbation(config, None, self.student)
        self.ema = copy.deepcopy(self.student) if config.ema_decay else None  # for the memory that it takes
        if not is_sharded(accelerator):
            normalise_alone(self.student)
        self.batch = random_batch(network, batch_size, device)
        self.generator = torch.Generator(device=device).manual_seed(0)
        self.model.train()

    def step(self) -> None:
        """One step, and wait until the device has done it."""
        train_step(
            self.accelerator, self.model, self.attacked, self.objective, self.optimizer, self.batch, self.generator,
            self.config.clip_grad, self.perturbation,
        )  # fmt: skip
        wait_for(self.accelerator.device)


def measure_steps(
    config: FinetuneConfig,
    accelerator: Accelerator,
    network: Backbone,
    build_objective: Callable[[nn.Module | None], Objective],
    batch_size: int,
    *,
    steps: int,
) -> Cost:
    """Train a copy of ``network`` for a step to warm up and ``steps`` more, on random images, as a run would.

    See `Rehearsal`. Neither the network nor any random state is changed. Processes exchange no gradients and are thus
    free to run out of memory apart, unless the network is sharded. Raises what the device raises when its memory is
    exhausted.
    """
    device = accelerator.device
    accumulated, accelerator.gradient_accumulation_steps = accelerator.gradient_accumulation_steps, 1
    scaler = accelerator.scaler
    if not is_sharded(accelerator):  # scaled gradients may overflow, and nothing here would skip their step
        accelerator.scaler = None
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            rehearsal = Rehearsal(config, accelerator, network, build_objective, batch_size)
            seconds = []
            reset_peak_memory(device)
            for _ in range(1 + steps):
                started = time.perf_counter()
                rehearsal.step()
                seconds.append(time.perf_counter() - started)
            values = [value for state in rehearsal.optimizer.state.values() for value in state.values()]
            kept = sum(value.numel() * value.element_size() for value in values if isinstance(value, torch.Tensor))
            return Cost(seconds[1:] or seconds, peak_memory(device), kept)
    finally:
        accelerator.gradient_accumulation_steps, accelerator.scaler = accumulated, scaler
        accelerator.step = 0
        if is_sharded(accelerator):
            accelerator.free_memory()


def measure_evaluation(
    accelerator: Accelerator,
    network: Backbone,
    batch_size: int,
    settings: PgdSettings | None,
    training: FinetuneConfig | None = None,
) -> float:
    """Seconds an image takes to be evaluated, clean and under PGD, on one process: as the final evaluation does it, or,
    given ``training``, a validation of that training."""
    copied = copy.deepcopy(network).to(accelerator.device)
    if training is None:  # the export is loaded anew, and evaluated in fp32
        copied.channels_last = False
        copied.to(memory_format=torch.contiguous_format)
    elif training.compile:
        copied.compile()
    student = copied if training is None else for_eval_passes(training, copied)
    batch = random_batch(network, batch_size, accelerator.device)
    native, accelerator.native_amp = accelerator.native_amp, accelerator.native_amp and training is not None
    try:
        with torch.no_grad(), accelerator.autocast():
            batch["label"] = student.eval()(batch["pixels"] / 255).logits.argmax(dim=1)  # right, and so all attacked
        count = partial(
            count_correct, student, [batch], accelerator, seed=0, description="estimate", total=batch_size, nested=True
        )
        if settings is not None:  # what is done once alone: compiling, choosing kernels
            count(settings._replace(steps=1))
        started = time.perf_counter()
        count(settings)
        return (time.perf_counter() - started) / batch_size
    finally:
        accelerator.native_amp = native


def random_batch(network: Backbone, batch_size: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Random images of the network's size, random labels, as a loader yields them; from a generator of their own."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (batch_size, 3, *network.preprocessing.size), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, network.num_classes, (batch_size,), generator=generator)
    return {
        "pixels": pixels.to(device), "label": labels.to(device), "index": torch.arange(batch_size, device=device),
    }  # fmt: skip


def largest_batch(peak_of: Callable[[int], int | None], limit: float, cap: int) -> int:
    """The largest batch, a multiple of eight where it is larger than that and at most ``cap``, whose peak of memory
    stays below ``limit`` bytes.

    ``peak_of`` runs a step of a batch: its peak in bytes, None when memory ran out. Two small batches give a line, the
    line a guess, and a step of that size confirms it.

    Raises:
        ConfigError: not even two images fit.
    """
    small = min(8, cap)
    while (low := peak_of(small)) is None or low > limit:
        if small <= 2:
            raise ConfigError(
                "--batch-size auto: not even two images fit into memory. Try --grad-checkpointing, --mixed-precision "
                "bf16, a smaller model or --image-size, or FSDP."
            )
        small = max(2, small // 2)
    larger = min(2 * small, cap)
    if larger == small or (high := peak_of(larger)) is None or high > limit:
        return small
    each = (high - low) / (larger - small)
    guess = cap if each <= 0 else min(cap, small + int((limit - low) / each))
    while (guess := guess // 8 * 8) > larger:
        peak = peak_of(guess)
        if peak is not None and peak <= limit:
            return guess
        guess = int(0.8 * guess)
    return larger


def choose_batch_size(
    config: FinetuneConfig,
    accelerator: Accelerator,
    network: Backbone,
    build_objective: Callable[[nn.Module | None], Objective],
    num_examples: int | None,
) -> int:
    """What --batch-size auto takes: the largest batch that fits in every process.

    Raises:
        ConfigError: see `largest_batch`, or the network is sharded, or the device is neither a CPU nor CUDA's.
    """
    if is_sharded(accelerator):
        raise ConfigError(
            "--batch-size auto: with FSDP a process that ran out of memory would stop all. Give a number."
        )
    device = accelerator.device
    if device.type not in MOST:
        raise ConfigError(f"--batch-size auto: how much memory {device.type!r} has left cannot be told. Give a number.")
    cap = MOST[device.type]
    if num_examples is not None:
        cap = min(cap, num_examples // accelerator.num_processes // config.grad_accum_steps)  # an epoch has a step
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    # what a rehearsal has not: the buckets of the exchange, and gradients that wait for another batch's
    apart = weights * ((accelerator.num_processes > 1) + (config.grad_accum_steps > 1))

    def peak_of(batch_size: int) -> int | None:
        peak, full = None, False
        try:
            # two steps: in the second the optimizer's state is there
            peak = measure_steps(config, accelerator, network, build_objective, batch_size, steps=1).peak
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            full = True
        release_memory()  # compiled networks are cycles
        return None if any_process(accelerator, full) else _largest(accelerator, (peak or 0) + apart)

    limit = (MARGIN if device.type == "cuda" else CPU_MARGIN) * memory_limit(accelerator)
    chosen = largest_batch(peak_of, -_largest(accelerator, -int(limit)), max(2, cap))
    if config.compile:
        torch.compiler.reset()  # what was compiled for batches of many sizes would serve the run too, and is slower
    return chosen


def _largest(accelerator: Accelerator, value: int) -> int:
    """The largest of the processes' values."""
    return int(accelerator.gather(torch.tensor([value], device=accelerator.device)).max())


def memory_limit(accelerator: Accelerator) -> int:
    """Bytes that this process could have: of its GPU, or its share of what the machine has left."""
    device = accelerator.device
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 8 << 30)
    return free // processes_here(accelerator) + (_status("VmRSS") or 0)


def reset_peak_memory(device: torch.device) -> None:
    """Begin to look for the peak anew."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif (marks := Path("/proc/self/clear_refs")).exists():
        marks.write_text("5")


def peak_memory(device: torch.device) -> int | None:
    """Bytes at the peak since `reset_peak_memory`: allocated on the GPU, or resident in the process; None where neither
    can be told."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(name: str) -> int | None:
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was told to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
