"""ARREST's training step against its floor and its peers, in one process: images/s, and the ratios of each repeat.

    python scripts/benchmarks/step.py --model resnet18_cifar --image-size 32 --batch-size 128
    python scripts/benchmarks/step.py --model resnet50 --image-size 224 --batch-size 16 --mixed-precision bf16
    python scripts/benchmarks/step.py --model vit_small_patch16_224 --batch-size 256 --mixed-precision bf16 --compile
    python scripts/benchmarks/step.py --peers plain --repeats 3 --at-least 1.3

Every repeat runs each once, in another order, so that a busy machine slows all alike; a figure is the median of the
repeats' ratios, with the smallest and the largest. Ours is the step that arrest-finetune takes. The floor is the sum
of what a step cannot do without, each measured alone: K attack passes (forward, gradient to the pixels), the trained
pass, the teacher's, the drift's, the update of the weights. It is compared with a step of ours of its own, since it
shares the memory that ours has just used: in every repeat ours runs once untimed, as after a step of training, then
the step and the floor, or the floor and the step. Random images, all of them attacked.

``--options`` adds our step with options switched off, or on. ``--at-least R`` ends with exit code 1 if our fastest step
is not R times as fast as the plain loop's fastest (what else runs on a machine only ever makes a step slower).
``--output`` writes JSON, which figure.py draws.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from peers import PEERS, library_version

from arrest_hub.arrest import angular_distance
from arrest_hub.attacks import frozen_eval, margin
from arrest_hub.backbones import Backbone, load_backbone
from arrest_hub.config import FinetuneConfig
from arrest_hub.data import to_pixels
from arrest_hub.estimate import Rehearsal, wait_for
from arrest_hub.machine import hardware_name, library_versions
from arrest_hub.prepare import new_accelerator
from arrest_hub.step import choose_images_at_once, refresh
from arrest_hub.throughput import forward_flops, peak_flops, step_flops
from arrest_hub.train import build_objective, set_options

OPTIONS = {
    "ours, BatchNorm not folded": {"fold_batchnorm": False},
    "ours, not channels_last": {"channels_last": False},
    "ours, the batch attacked at once": {"images_at_once": None},
    "ours, none of these": {"fold_batchnorm": False, "channels_last": False, "images_at_once": None},
    "ours, compiled": {"compile": True},
}


class Floor:
    """What a step of ``ours`` cannot do without; each part is a function that does it once."""

    def __init__(self, ours: Rehearsal) -> None:
        self.ours, config = ours, ours.config
        self.pixels, self.labels = to_pixels(ours.batch["pixels"]), ours.batch["label"]
        assert ours.teacher is not None
        with torch.no_grad(), ours.accelerator.autocast():
            self.target = ours.teacher(self.pixels).representation
        self.parts: dict[str, tuple[int, Callable[[], None]]] = {
            "attack pass": (config.attack_steps, self.attack_pass),
            "trained pass": (1, self.trained_pass),
            "teacher's pass": (1, partial(self.clean_pass, ours.teacher)),
            "drift's pass": (1, partial(self.clean_pass, ours.attacked)),
            "update": (1, self.update),
        }

    def attack_pass(self) -> None:
        """Forward, and the gradient to the pixels."""
        pixels = self.pixels
        count = math.ceil(len(pixels) / (self.ours.config.images_at_once or len(pixels)))
        for some, labels in zip(pixels.tensor_split(count), self.labels.tensor_split(count), strict=True):
            some = some.detach().requires_grad_(True)
            with self.ours.accelerator.autocast():
                loss = margin(self.ours.attacked(some).logits, labels).sum()
            torch.autograd.grad(loss, some)

    def trained_pass(self) -> None:
        """Forward and backward through the student in training mode."""
        with self.ours.accelerator.autocast():
            output = self.ours.model(self.pixels)
            loss = F.cross_entropy(output.logits.float(), self.labels)
            loss = loss + self.ours.config.rgkd_weight * angular_distance(output.representation, self.target).mean()
        loss.backward()

    @torch.no_grad()
    def clean_pass(self, network: torch.nn.Module) -> None:
        """Forward, without gradients."""
        with self.ours.accelerator.autocast():
            network(self.pixels)

    def update(self) -> None:
        """Of the weights, with the gradients that the trained pass left."""
        self.ours.optimizer.step()
        self.ours.optimizer.zero_grad()

    def measure(self, device: torch.device) -> dict[str, float]:
        """Seconds of each part, as often as a step needs it."""
        refresh(self.ours.attacked)
        seconds = {}
        for name, (times, run) in self.parts.items():
            once = min(times, 3)
            wait_for(device)
            started = time.perf_counter()
            frozen = name in ("attack pass", "drift's pass")
            with frozen_eval(self.ours.attacked) if frozen else nullcontext():
                for _ in range(once):
                    run()
            wait_for(device)
            seconds[name] = (time.perf_counter() - started) * times / once
        return seconds


def build(config: FinetuneConfig, network: Backbone, accelerator: Accelerator) -> Rehearsal:
    """Our step."""
    prepared = copy.deepcopy(network)
    set_options(config, prepared)
    return Rehearsal(config, accelerator, prepared, partial(build_objective, config), config.batch_size)


def processor() -> str:
    """The CPU's name, where the system says it."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18_cifar", help="a timm architecture, or anything --model takes")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--attack-steps", type=int, default=10)
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--compile", action="store_true", help="compile our networks")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", default=",".join(PEERS), help="of " + ", ".join(PEERS))
    parser.add_argument("--options", action="store_true")
    parser.add_argument("--no-floor", action="store_true")
    parser.add_argument("--at-least", type=float)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    config = FinetuneConfig(
        model=args.model, dataset="none", batch_size=args.batch_size, attack_steps=args.attack_steps, eps="8/255",
        mixed_precision=args.mixed_precision, compile=args.compile, image_size=args.image_size, replay_threshold=1.0,
    ).validate()  # fmt: skip
    accelerator = new_accelerator(mixed_precision=config.mixed_precision)
    device = accelerator.device
    torch.manual_seed(0)
    network = load_backbone(args.model, image_size=args.image_size)
    config.images_at_once = choose_images_at_once(config, network, device)
    ours = build(config, network, accelerator)
    steps: dict[str, Callable[[], None]] = {"ours": ours.step}
    if args.options:
        for name, changes in OPTIONS.items():
            if any(getattr(config, key) != value for key, value in changes.items()):
                changed = FinetuneConfig(**{**vars(config), **changes}).validate()
                steps[name] = build(changed, network, accelerator).step
    versions = {}
    for key in [key for key in args.peers.split(",") if key]:
        found = library_version(key)
        if found is None:
            print(f"{key} is not installed and is left out")
            continue
        versions |= {key: found} if found else {}
        steps[PEERS[key].name] = PEERS[key](config, network, device).step
    floor = None if args.no_floor else Floor(ours)
    where = hardware_name(accelerator)
    size = network.preprocessing.size[0]
    print(f"{args.model}, {size} px, batch {config.batch_size}, PGD-{config.attack_steps}, {args.repeats} repeats")
    print(f"precision {config.mixed_precision}; {where}, torch {torch.__version__}", flush=True)

    seconds: dict[str, list[float]] = {name: [] for name in steps}
    parts: list[dict[str, float]] = []
    beside: list[float] = []  # our steps that the floor is compared with

    def time_step(name: str) -> float:
        started = time.perf_counter()
        steps[name]()
        return time.perf_counter() - started

    for repeat in range(-1, args.repeats):  # the first warms up
        names = list(steps)
        shift = repeat % len(names)
        for name in names[shift:] + names[:shift]:
            seconds[name].append(time_step(name))
        if floor is not None:
            steps["ours"]()
            if repeat % 2:
                beside.append(time_step("ours"))
            parts.append(floor.measure(device))
            if not repeat % 2:
                beside.append(time_step("ours"))
        if repeat < 0:
            seconds = {name: [] for name in steps}
            parts, beside = [], []

    record: dict[str, Any] = {
        "model": args.model, "image_size": size, "batch_size": config.batch_size, "attack_steps": config.attack_steps,
        "mixed_precision": config.mixed_precision, "compile": config.compile, "images_at_once": config.images_at_once,
        "repeats": args.repeats, "hardware": where, "processor": processor(),
        "versions": {**library_versions(), **versions},
        "command": "python scripts/benchmarks/step.py " + " ".join(sys.argv[1:]), "rows": {},
    }  # fmt: skip
    forward = forward_flops(network, torch.rand(1, 3, *network.preprocessing.size))
    record["gflop_per_image"] = step_flops(forward, ours.objective.passes) / 1e9
    others = [name for name in ("plain loop", "torchattacks", "ours") if name in seconds]
    print(f"{'':<34}{'images/s':>10}" + "".join(f"{'x ' + other:>22}" for other in others))
    for name, measured in seconds.items():
        speed = config.batch_size / statistics.median(measured)
        row: dict[str, Any] = {"seconds": measured, "images_per_second": speed}
        shown = ""
        for other in others:
            ratio = spread([b / a for a, b in zip(measured, seconds[other], strict=True)])
            row[f"times_{other}"] = ratio
            shown += f"{ratio['median']:>9.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"
        peak = peak_flops(device, config.mixed_precision)
        if peak is not None:
            row["mfu"] = row["images_per_second"] * record["gflop_per_image"] * 1e9 / peak
            shown += f"   MFU {100 * row['mfu']:.1f} %"
        record["rows"][name] = row
        print(f"{name:<34}{speed:>10.2f}{shown}")
    if parts:
        sums = [sum(part.values()) for part in parts]
        overhead = spread([a / b for a, b in zip(beside, sums, strict=True)])
        shares = {name: statistics.median(part[name] / sum(part.values()) for part in parts) for name in parts[0]}
        record["floor"] = {"seconds": sums, "seconds_of_ours": beside, "overhead": overhead, "shares": shares}
        print(f"ours / floor: {overhead['median']:.3f} ({overhead['min']:.3f}-{overhead['max']:.3f})")
        print("of the floor: " + ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items()))
    if args.output:
        args.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if args.at_least is not None:
        reached = min(seconds["plain loop"]) / min(seconds["ours"])
        verdict = "at least" if reached >= args.at_least else "NOT at least"
        print(f"fastest against fastest {reached:.2f} times the plain loop: {verdict} {args.at_least}")
        sys.exit(reached < args.at_least)


if __name__ == "__main__":
    main()
