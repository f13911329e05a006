"""How training scales over processes on one machine: images/s of several against one, of one thread each.

    python scripts/benchmarks/processes.py --model resnet18_cifar --processes 2 --repeats 3

Both train on the same global batch with `arrest-finetune` itself, in turn, so that a busy machine slows both alike;
the figure is the ratio of the medians. Written to --output as JSON if given.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch


def images_per_second(args: argparse.Namespace, processes: int, folder: Path) -> float:
    """Of one run: the mean over its last steps, as log.jsonl has it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [
        *("-m", "arrest_hub", "finetune", "--recipe", "default", "--model", args.model, "--dataset", args.dataset),
        *("--method", "at", "--init", "random", "--batch-size", str(args.batch_size // processes)),
        *("--attack-steps", str(args.attack_steps), "--max-steps", str(args.steps)),
        *("--log-every", str(args.steps // 2), "--limit-eval", "10", "--eval-attack-steps", "1", "--eval-every", "0"),
        *("--num-workers", "0", "--no-figures", "--output-dir", str(folder)),
    ]
    if args.image_size:
        command += ["--image-size", str(args.image_size)]
    done = subprocess.run(
        command, env=dict(os.environ, OMP_NUM_THREADS="1"), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["images_per_second"] for line in lines if "images_per_second" in line][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18_cifar")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64, help="over all processes")
    parser.add_argument("--attack-steps", type=int, default=10)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    speeds: dict[int, list[float]] = {1: [], args.processes: []}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(args.repeats):
            for processes, found in speeds.items():
                found.append(images_per_second(args, processes, Path(folder) / f"{processes}-{repeat}"))
                print(f"{processes} process(es): {found[-1]:.1f} images/s", flush=True)
    ratio = statistics.median(speeds[args.processes]) / statistics.median(speeds[1])
    print(f"{args.processes} processes are {ratio:.2f} times as fast as one")
    if args.output:
        result = {"ratio": ratio, "images_per_second": speeds, "torch": torch.__version__, "cores": os.cpu_count(),
                  "machine": platform.machine(), **{k: v for k, v in vars(args).items() if k != "output"}}  # fmt: skip
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
