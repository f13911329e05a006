"""What a step costs against the attack's steps, the batch, the resolution and the network.

    python scripts/benchmarks/scaling.py --output scripts/benchmarks/results/scaling.json

From one setting, each axis alone is changed; the steps are those of arrest-finetune, on random images, every image
attacked (arrest_hub.estimate.measure_steps). Every repeat goes through all settings. Printed are seconds per image, and
per image and attack step, in the median.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path

import torch

from arrest_hub.backbones import load_backbone
from arrest_hub.config import FinetuneConfig
from arrest_hub.estimate import measure_steps
from arrest_hub.machine import hardware_name, library_versions
from arrest_hub.prepare import new_accelerator
from arrest_hub.step import choose_images_at_once
from arrest_hub.throughput import forward_flops, step_flops
from arrest_hub.train import build_objective, set_options


def numbers(text: str) -> list[int]:
    """``1,2,3``"""
    return [int(part) for part in text.split(",") if part]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18_cifar")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--attack-steps", type=int, default=10)
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--all-attack-steps", type=numbers, default=[1, 3, 10, 20])
    parser.add_argument("--batch-sizes", type=numbers, default=[8, 32, 128])
    parser.add_argument("--image-sizes", type=numbers, default=[16, 32, 64])
    parser.add_argument("--models", default="resnet18_cifar,preact_resnet18_cifar,wide_resnet28_10_cifar")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    base = {"model": args.model, "image_size": args.image_size, "batch_size": args.batch_size,
            "attack_steps": args.attack_steps}  # fmt: skip
    axes = {"attack_steps": args.all_attack_steps, "batch_size": args.batch_sizes, "image_size": args.image_sizes,
            "model": args.models.split(",")}  # fmt: skip
    settings = [(axis, {**base, axis: value}) for axis, values in axes.items() for value in values]
    accelerator = new_accelerator(mixed_precision=args.mixed_precision)
    seconds: list[list[float]] = [[] for _ in settings]
    flops = [0.0 for _ in settings]
    for _ in range(args.repeats):
        for number, (_, setting) in enumerate(settings):
            config = FinetuneConfig(
                dataset="none", replay_threshold=1.0, mixed_precision=args.mixed_precision, **setting
            ).validate()
            network = load_backbone(config.model, image_size=config.image_size)
            set_options(config, network)
            config.images_at_once = choose_images_at_once(config, network, accelerator.device)
            build = partial(build_objective, config)
            cost = measure_steps(config, accelerator, network, build, config.batch_size, steps=1)
            seconds[number].append(cost.median / config.batch_size)
            forward = forward_flops(network, torch.zeros(1, 3, *network.preprocessing.size))
            flops[number] = step_flops(forward, build(network).passes)
    print(f"{hardware_name(accelerator)}, torch {torch.__version__}, {base}, precision {args.mixed_precision}")
    print(f"{'':<14}{'':<26}{'ms/image':>10}{'ms/image/attack step':>24}{'GFLOP/s':>10}")
    rows = []
    for (axis, setting), measured, count in zip(settings, seconds, flops, strict=True):
        each = statistics.median(measured)
        print(f"{axis:<14}{setting[axis]!s:<26}{1e3 * each:>10.2f}{1e3 * each / setting['attack_steps']:>24.2f}"
              f"{count / each / 1e9:>10.1f}", flush=True)  # fmt: skip
        rows.append({"axis": axis, **setting, "seconds_per_image": measured, "flop_per_image": count})
    if args.output:
        record = {"command": "python scripts/benchmarks/scaling.py " + " ".join(sys.argv[1:]), "rows": rows,
                  "mixed_precision": args.mixed_precision, "hardware": hardware_name(accelerator),
                  "versions": library_versions()}  # fmt: skip
        args.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
