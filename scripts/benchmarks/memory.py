"""Peak memory of training steps, and images/s: precisions, folding, compilation, gradient checkpointing.

    python scripts/benchmarks/memory.py --models resnet50,vit_small_patch16_224 --batch-size 128

Random images, the steps that arrest-finetune takes (arrest_hub.estimate.measure_steps), every image attacked. Memory is
what is allocated on the GPU, or resident in the process, which is a new one for every row.
"""

from __future__ import annotations

import argparse
import json
import platform
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from arrest_hub.backbones import load_backbone
from arrest_hub.config import FinetuneConfig
from arrest_hub.estimate import measure_steps
from arrest_hub.out_of_memory import is_out_of_memory
from arrest_hub.prepare import new_accelerator
from arrest_hub.step import choose_images_at_once
from arrest_hub.train import build_objective, set_options

VARIANTS = {
    "fp32": {},
    "fp32, BatchNorm not folded": {"fold_batchnorm": False},
    "bf16": {"mixed_precision": "bf16"},
    "bf16, compile": {"mixed_precision": "bf16", "compile": True},
}


def measure(model: str, image_size: int | None, config: FinetuneConfig, steps: int) -> dict[str, Any]:
    """Seconds of the steps and peak bytes; neither where memory ran out."""
    network = load_backbone(model, image_size=image_size)
    set_options(config, network)
    accelerator = new_accelerator(mixed_precision=config.mixed_precision)
    config.images_at_once = choose_images_at_once(config, network, accelerator.device)
    objective = partial(build_objective, config, static_shapes=True)
    try:
        cost = measure_steps(config, accelerator, network, objective, config.batch_size, steps=steps)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return {}
    speed = config.batch_size / cost.median
    return {"images_per_second": speed, "seconds": cost.seconds, "peak_bytes": cost.peak}


def in_a_new_process(*args: Any) -> dict[str, Any]:
    """The same, by a process of its own, so that nothing is left of what was measured before."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, *args).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="resnet50,vit_small_patch16_224", help="timm architectures")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--attack-steps", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--without", default="", help="variants to leave out, by a part of their name")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    print(f"{device}, torch {torch.__version__}, batch {args.batch_size}, PGD-{args.attack_steps}")
    print(f"{'model':<26}{'variant':<32}{'checkpointing':<15}{'images/s':>10}{'peak memory':>15}")
    rows = []
    for model in args.models.split(","):
        for variant, changes in VARIANTS.items():
            if args.without and args.without in variant:
                continue
            for checkpointing in (False, True):
                config = FinetuneConfig(
                    model=model, dataset="none", batch_size=args.batch_size, attack_steps=args.attack_steps,
                    eps="4/255", grad_checkpointing=checkpointing, **changes,
                ).validate()  # fmt: skip
                found = in_a_new_process(model, args.image_size, config, args.steps)
                rows.append({"model": model, "variant": variant, "grad_checkpointing": checkpointing, **found})
                shown = f"{'out of memory':>22}"
                if found:
                    peak = "not measured" if found["peak_bytes"] is None else f"{found['peak_bytes'] / 1e9:.2f} GB"
                    shown = f"{found['images_per_second']:>10.1f}{peak:>15}"
                print(f"{model:<26}{variant:<32}{checkpointing!s:<15}{shown}", flush=True)
    if args.output:
        facts = {"device": device, "torch": torch.__version__, "python": platform.python_version(), "rows": rows}
        facts |= {key: value for key, value in vars(args).items() if key != "output"}
        args.output.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
