"""What a figure was measured with: hardware and library versions."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator


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
