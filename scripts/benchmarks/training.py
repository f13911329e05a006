"""Images per second and peak memory of training steps: precisions, compilation, layout, gradient checkpointing.

    python scripts/benchmarks/training.py --models resnet50,vit_small_patch16_224 --batch-size 128

One process, random images, the steps that arrest-finetune takes (arrest_hub.estimate.measure_steps), every image
attacked.
"""

from __future__ import annotations

import argparse
import json
import platform
from functools import partial
from pathlib import Path

import torch

from arrest_hub.backbones import load_backbone
from arrest_hub.config import FinetuneConfig
from arrest_hub.estimate import OUT_OF_MEMORY, measure_steps
from arrest_hub.prepare import new_accelerator
from arrest_hub.train import build_objective, set_options

VARIANTS = {
    "fp32": {},
    "bf16": {"mixed_precision": "bf16"},
    "bf16, compile, channels_last": {"mixed_precision": "bf16", "compile": True, "channels_last": True},
}


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
    print(f"{'model':<26}{'variant':<32}{'checkpointing':<15}{'images/s':>10}{'peak':>12}")
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
                network = load_backbone(model, image_size=args.image_size)
                set_options(config, network)
                accelerator = new_accelerator(mixed_precision=config.mixed_precision)
                objective = partial(build_objective, config, static_shapes=True)
                torch.compiler.reset()
                try:
                    cost = measure_steps(config, accelerator, network, objective, config.batch_size, steps=args.steps)
                except OUT_OF_MEMORY:
                    print(f"{model:<26}{variant:<32}{checkpointing!s:<15}{'out of memory':>22}", flush=True)
                    rows.append({"model": model, "variant": variant, "grad_checkpointing": checkpointing})
                    continue
                speed = config.batch_size / cost.median
                peak = "not measured" if cost.peak is None else f"{cost.peak / 1e9:.2f} GB"
                print(f"{model:<26}{variant:<32}{checkpointing!s:<15}{speed:>10.1f}{peak:>12}", flush=True)
                rows.append({"model": model, "variant": variant, "grad_checkpointing": checkpointing,
                             "images_per_second": speed, "seconds": cost.seconds, "peak_bytes": cost.peak})  # fmt: skip
    if args.output:
        facts = {"device": device, "torch": torch.__version__, "python": platform.python_version(), "rows": rows}
        facts |= {key: value for key, value in vars(args).items() if key != "output"}
        args.output.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
