"""Where a step's time goes, and how much of the hardware it uses."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from arrest_hub.attacks import modes_kept
from arrest_hub.progress import WaitTimer
from arrest_hub.tf32 import tf32_allowed

TIMED = ("images_per_second", "data_wait", "attack_share", "training_share", "teacher_share", "peak_memory_gb", "mfu")
"""What a line of the log says of the speed, and so another at every run."""

COSTS = {"attack": 2, "sensitivity": 2, "training": 3, "perturbation": 3}
"""Of a pass of an objective, in forward passes: the gradient to the pixels costs one more, that to the parameters
another. Any other pass is a forward pass alone."""

PEAK_FLOPS: dict[str, dict[str, float]] = {
    "B200": {"half": 2250e12},
    "H200 NVL": {"half": 835e12, "tf32": 417e12, "fp32": 60e12},
    "H200": {"half": 989e12, "tf32": 494e12, "fp32": 67e12},
    "H100 PCIe": {"half": 756e12, "tf32": 378e12, "fp32": 51e12},
    "H100 NVL": {"half": 835e12, "tf32": 417e12, "fp32": 60e12},
    "H100": {"half": 989e12, "tf32": 494e12, "fp32": 67e12},
    "L40S": {"half": 362e12, "tf32": 183e12, "fp32": 91.6e12},
    "L4": {"half": 121e12, "tf32": 60e12, "fp32": 30.3e12},
    "A100": {"half": 312e12, "tf32": 156e12, "fp32": 19.5e12},
    "A10": {"half": 125e12, "tf32": 62.5e12, "fp32": 31.2e12},
    "V100": {"half": 125e12, "fp32": 15.7e12},
    "T4": {"half": 65e12, "fp32": 8.1e12},
}
"""By words of the GPU's name, the first that fit: dense operations a second (NVIDIA's data sheets). "half" is bf16 or
fp16 with tensor cores."""


class Stopwatch:
    """Seconds by name, of what runs within ``with stopwatch(name):``; on a GPU by its own clock, without waiting."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count what happens inside for ``name``."""
        if self.device.type == "cuda":
            started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            started.record()
            yield
            ended.record()
            self._events.append((name, started, ended))
        else:
            began = time.perf_counter()
            yield
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - began

    def read(self) -> dict[str, float]:
        """The seconds since the last call; waits for the GPU."""
        if self._events:
            torch.cuda.synchronize(self.device)
        for name, started, ended in self._events:
            self._seconds[name] = self._seconds.get(name, 0.0) + started.elapsed_time(ended) / 1e3
        seconds, self._seconds, self._events = self._seconds, {}, []
        return seconds


def time_shares(seconds: Mapping[str, float], wall: float) -> dict[str, float]:
    """Of ``wall`` seconds, the shares of the attack, of the teacher (with the drift and other passes over clean images)
    and of the training pass (with the perturbation and the update of the weights), from what a `Stopwatch` read: "step"
    and its parts."""
    attack = seconds.get("attack", 0.0)
    clean = sum(value for name, value in seconds.items() if name not in ("attack", "step"))
    shares = {"training_share": seconds.get("step", 0.0) - attack - clean}
    shares |= {"attack_share": attack} if "attack" in seconds else {}
    shares |= {"teacher_share": clean} if seconds.keys() - {"attack", "step"} else {}
    return {name: value / wall for name, value in shares.items()}


class Pace:
    """Of the steps between two lines of the log: images/s, where the time went, what the GPU was used for.

    ``stopwatch`` times the steps, as "step", and their parts; ``waiting`` what waits for images.
    """

    def __init__(self, device: torch.device, utilisation: Utilisation) -> None:
        self.stopwatch, self.waiting, self.utilisation = Stopwatch(device), WaitTimer(), utilisation
        self.images = 0
        self._since = time.perf_counter()

    def add(self, images: int) -> None:
        """A batch of all processes was trained on."""
        self.images += images

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is no training and takes no time."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def read(self, attack_steps: float) -> dict[str, float]:
        """The values to log, since the last call; ``attack_steps``: how many an image was attacked in, on average."""
        parts = self.stopwatch.read()  # waits for the GPU, so that the time is true
        wall = time.perf_counter() - self._since
        speed = self.images / wall
        values = {"images_per_second": speed, "data_wait": self.waiting.seconds / wall}
        values |= time_shares(parts, wall) | self.utilisation.read(speed, attack_steps)
        self.images, self.waiting.seconds, self._since = 0, 0.0, time.perf_counter()
        return values


class Utilisation:
    """What training makes of the GPU: peak memory, and model FLOP utilisation where the GPU's peak is known. Nothing on
    other devices.

    Args:
        network: the student, and ``image_size`` its images' (height, width) in pixels.
        passes: an objective's, per image; of the attack's, how many there were is said when it is read.
        processes: each with a GPU like this one.
    """

    def __init__(
        self,
        network: nn.Module,
        image_size: tuple[int, int],
        passes: Mapping[str, float],
        device: torch.device,
        mixed_precision: str,
        processes: int,
    ) -> None:
        self.device, self.passes = device, passes
        peak = peak_flops(device, mixed_precision)
        self.peak = None if peak is None else peak * processes
        where = next(network.parameters()).device
        self.forward = 0.0 if peak is None else forward_flops(network, torch.zeros(1, 3, *image_size, device=where))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def read(self, images_per_second: float, attack_steps: float) -> dict[str, float]:
        """``peak_memory_gb`` (10^9 bytes, of this process) and ``mfu``, where an image took ``attack_steps``."""
        if self.device.type != "cuda":
            return {}
        values = {"peak_memory_gb": torch.cuda.max_memory_allocated(self.device) / 1e9}
        if self.peak is not None:
            passes = {**self.passes, "attack": attack_steps}
            values["mfu"] = images_per_second * step_flops(self.forward, passes) / self.peak
        return values


def forward_flops(network: nn.Module, images: Tensor) -> float:
    """Operations of one forward pass per image (a multiplication and an addition are two): [B, 3, H, W] in [0, 1]."""
    with modes_kept(network):
        network.eval()
        # the other kernels of attention are not all counted
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            network.forward(images)  # not the compiled one, which is not counted
    return counter.get_total_flops() / len(images)


def step_flops(forward: float, passes: Mapping[str, float]) -> float:
    """Operations per image of a step of these passes (an objective's ``passes``), from those of a forward pass."""
    return forward * sum(count * COSTS.get(name, 1) for name, count in passes.items())


def peak_flops(device: torch.device, mixed_precision: str) -> float | None:
    """Operations a second that the GPU could do in a precision ("no", "bf16", "fp16"); None where nobody said."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peaks = next((peaks for words, peaks in PEAK_FLOPS.items() if re.search(rf"\b{words}\b", name)), {})
    if mixed_precision == "fp16":
        return peaks.get("half")
    if mixed_precision == "bf16":
        return peaks.get("half") if "tf32" in peaks or "fp32" not in peaks else None  # not before Ampere
    convolutions, products = tf32_allowed()
    if "tf32" not in peaks or not (convolutions or products):
        return peaks.get("fp32")
    return peaks["tf32"] if convolutions and products else None  # in part the one, in part the other
