"""What a figure was measured with: hardware and library versions."""

from __future__ import annotations

import platform
import time
from functools import cache
from importlib import metadata
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

SLOW = 2.0
"""From which slowdown on a warning is due: with arithmetic for it a CPU takes less time in bf16, not more."""

version = cache(metadata.version)
"""Of an installed package; looked up in its files once."""


def library_versions(library: str = "timm") -> dict[str, str]:
    """Versions of what the figures depend on; ``library`` is the one that the model comes from."""
    names = ["arrest-hub", "torch", "torchvision", "timm", "accelerate", "datasets", "huggingface-hub"]
    names += ["transformers"] if library == "transformers" else []
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def hardware_name(accelerator: Accelerator) -> str:
    """``2 x NVIDIA H200`` or ``1 x CPU (AMD EPYC 9B14, x86_64, 2 threads)``."""
    if accelerator.device.type == "cuda":
        return f"{accelerator.num_processes} x {torch.cuda.get_device_name(accelerator.device)}"
    facts = [processor_name(), platform.machine(), f"{torch.get_num_threads()} threads"]
    return f"{accelerator.num_processes} x CPU ({', '.join(fact for fact in facts if fact)})"


def processor_name(facts: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's model, where the system says it (Linux: in the file ``facts``); else an empty string."""
    if not facts.is_file():
        return "" if platform.processor() == platform.machine() else platform.processor()
    lines = (line.partition(":") for line in facts.read_text(encoding="utf-8", errors="replace").splitlines())
    return next((value.strip() for name, _, value in lines if name.strip() == "model name"), "")


def bf16_slowdown() -> float:
    """How many times as long as in float32 a convolution takes in bfloat16 on a core of this CPU, measured now, within
    a quarter of a second: about 10 to 20 where it is emulated (an AMD EPYC of Zen 3)."""
    threads, seconds = torch.get_num_threads(), []
    torch.set_num_threads(1)  # several wait for each other where others work too
    try:
        for dtype in (torch.float32, torch.bfloat16):
            images = torch.ones(8, 64, 16, 16, dtype=dtype).contiguous(memory_format=torch.channels_last)
            weight = torch.ones(64, 64, 3, 3, dtype=dtype)
            best = float("inf")
            for _ in range(3):
                began = time.perf_counter()
                nn.functional.conv2d(images, weight, padding=1)
                best = min(best, time.perf_counter() - began)
            seconds.append(best)
    finally:
        torch.set_num_threads(threads)
    return seconds[1] / seconds[0]


def bf16_warning(accelerator: Accelerator, instead: str) -> str | None:
    """A sentence for a CPU that emulates bfloat16; ``instead``: what to type."""
    if accelerator.device.type != "cpu" or (slowdown := bf16_slowdown()) < SLOW:
        return None
    return (
        f"warning: this CPU has no arithmetic for bf16: a convolution takes {slowdown:.0f} times as long as in fp32. "
        f"Give {instead}."
    )
