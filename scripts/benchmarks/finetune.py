"""arrest-finetune's own images/s against the benchmark's step: is there a hidden cost in data, logging, progress?

    python scripts/benchmarks/finetune.py --model resnet18-folder --dataset cifar10-folder --batch-size 32 --steps 200

Runs `finetune` itself, with its loader, log and progress bar. At every line of the log the run pauses for two of the
steps that step.py times (the same batch, random images), so that a busy machine slows both alike. The figure is the
run's images/s, over all its steps, divided by those of the benchmark's steps. Every image is attacked: no sample is
replayed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from arrest_hub import loop
from arrest_hub.backbones import load_backbone
from arrest_hub.config import FinetuneConfig
from arrest_hub.estimate import Rehearsal
from arrest_hub.machine import hardware_name, library_versions
from arrest_hub.step import choose_images_at_once
from arrest_hub.throughput import Pace
from arrest_hub.train import build_objective, finetune, set_options

STEPS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--attack-steps", type=int, default=10)
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    folder = tempfile.TemporaryDirectory()
    config = FinetuneConfig(
        model=args.model, dataset=args.dataset, batch_size=args.batch_size, attack_steps=args.attack_steps,
        mixed_precision=args.mixed_precision, max_steps=args.steps, replay_threshold=1.0, eval_every=0, limit_eval=10,
        export_weights="last", figures=False, output_dir=f"{folder.name}/run",
    ).validate()  # fmt: skip
    benchmark: list[float] = []
    intervals: list[tuple[int, float]] = []
    known: dict[str, Any] = {}
    plain_step = loop.train_step

    def noted(accelerator: Any, *rest: Any) -> Any:
        known["accelerator"] = accelerator
        return plain_step(accelerator, *rest)

    def rehearsal() -> Rehearsal:
        if "rehearsal" not in known:
            network = load_backbone(config.model)
            set_options(config, network)
            config.images_at_once = choose_images_at_once(config, network, known["accelerator"].device)
            objective = partial(build_objective, config)
            known["rehearsal"] = Rehearsal(config, known["accelerator"], network, objective, config.batch_size)
            known["rehearsal"].step()
        return known["rehearsal"]

    class Interrupted(Pace):
        def read(self, attack_steps: float) -> dict[str, float]:
            images = self.images
            values = super().read(attack_steps)
            intervals.append((images, images / values["images_per_second"]))
            with self.paused():
                step = rehearsal().step
                for _ in range(STEPS):
                    started = time.perf_counter()
                    step()
                    benchmark.append(time.perf_counter() - started)
            return values

    loop.train_step, loop.Pace = noted, Interrupted
    finetune(config)
    own = sum(images for images, _ in intervals) / sum(seconds for _, seconds in intervals)
    bare = config.batch_size / statistics.mean(benchmark)
    halves = len(intervals) // 2
    ratios = [
        sum(images for images, _ in part) / sum(seconds for _, seconds in part)
        / (config.batch_size / statistics.mean(steps))
        for part, steps in (
            (intervals[:halves], benchmark[: STEPS * halves]), (intervals[halves:], benchmark[STEPS * halves :])
        )
    ]  # fmt: skip
    lines = [json.loads(line) for line in Path(config.output_dir, "log.jsonl").read_text().splitlines()]
    shares = {key: statistics.mean(line[key] for line in lines if key in line)
              for key in ("attack_share", "training_share", "teacher_share", "data_wait")}  # fmt: skip
    print(f"{own:.3f} images/s in {args.steps} steps of arrest-finetune, {bare:.3f} in {len(benchmark)} of the "
          f"benchmark's: {own / bare:.4f} (first half {ratios[0]:.4f}, second {ratios[1]:.4f})")  # fmt: skip
    print("of the run's time: " + ", ".join(f"{name} {100 * value:.2f} %" for name, value in shares.items()))
    if args.output:
        record = {
            "command": "python scripts/benchmarks/finetune.py " + " ".join(sys.argv[1:]), "images_per_second": own,
            "benchmark_images_per_second": bare, "ratio": own / bare, "ratio_of_halves": ratios, "shares": shares,
            "hardware": hardware_name(known["accelerator"]), "torch_threads": torch.get_num_threads(),
            "versions": library_versions(),
        }  # fmt: skip
        args.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
