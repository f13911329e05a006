"""Cheaper attacks in training: what they cost and what they leave of clean and robust accuracy.

    python scripts/benchmarks/cheaper.py --model M --dataset cifar10 --epochs 4 --limit-train 10000 --seeds 0,1 \
        --output-dir runs/cheaper --output cheaper.json --figure cheaper.png

Each variant is a run of arrest-finetune that differs in nothing else, with each seed, in a folder of its own; a run
that is there already is not made again. Accuracies are those of the last weights on test images, clean and PGD-20.
The cost is counted in forward passes: two for a step of the attack, three for the trained pass, one each for teacher
and drift. Images/s are the runs' own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from arrest_hub.config import FinetuneConfig
from arrest_hub.figures import BLUE, COLOURS, DARK, DPI, GREY
from arrest_hub.machine import library_versions
from arrest_hub.results import harmonic_mean, read_results
from arrest_hub.throughput import step_flops
from arrest_hub.train import finetune

VARIANTS: dict[str, dict[str, Any]] = {
    "PGD-10": {},
    "PGD-5": {"attack_steps": 5},
    "PGD-3": {"attack_steps": 3},
    "PGD-2": {"attack_steps": 2},
    "1 to 10 steps": {"attack_steps_start": 1},
    "stop at once": {"attack_stop_after": 0},
    "stop after 1": {"attack_stop_after": 1},
    "stop after 3": {"attack_stop_after": 3},
    "1 to 10 steps, stop after 3": {"attack_steps_start": 1, "attack_stop_after": 3},
    "batch x 2": {"batch_size": 2},
}
"""What differs; ``batch_size``: times as large, and so is the learning rate."""
KINDS = {"PGD": ("o", BLUE, "fewer steps"), "1 to": ("^", COLOURS[1], "growing"), "stop": ("s", COLOURS[2], "stopped"),
         "batch": ("D", GREY, "larger batch")}  # fmt: skip


def train(args: argparse.Namespace, name: str, seed: int) -> None:
    """One run, unless it is there."""
    folder = run_folder(args.output_dir, name, seed)
    if (folder / "export" / "results.json").exists():
        return
    changes = dict(VARIANTS[name])
    times = changes.pop("batch_size", 1)
    finetune(
        FinetuneConfig(
            model=args.model, dataset=args.dataset, epochs=args.epochs, limit_train=args.limit_train,
            limit_eval=args.limit_eval, batch_size=args.batch_size * times, lr=args.lr * times,
            rgkd_weight=args.rgkd_weight, mixed_precision=args.mixed_precision, seed=seed, eval_every=0,
            export_weights="last", figures=False, num_workers=args.num_workers, log_every=5, output_dir=str(folder),
            overwrite=True, **changes,
        ).validate()
    )  # fmt: skip


def run_folder(root: Path, name: str, seed: int) -> Path:
    """Of a variant and a seed."""
    return root / f"{name.replace(',', '').replace(' ', '-')}-seed-{seed}"


def read_run(folder: Path) -> dict[str, float]:
    """What a finished run cost and reached."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["phase"] == "robust" and "loss" in line]
    steps = statistics.mean(line["attack_steps"] for line in lines)
    results = read_results(folder / "export" / "results.json")
    clean, robust = results.results[0].value, results.results[1].value
    passes = {"attack": steps, "training": 1, "teacher": 1, "drift": 1}
    return {
        "clean_accuracy": clean, "robust_accuracy": robust, "harmonic_mean": harmonic_mean(clean, robust),
        "attack_steps": steps, "forward_passes": step_flops(1.0, passes), "n": results.results[0].n,
        "replay_rate": statistics.mean(line["replay_rate"] for line in lines),
        "images_per_second": 1 / statistics.mean(1 / line["images_per_second"] for line in lines),
    }  # fmt: skip


def draw(path: Path, rows: dict[str, list[dict[str, float]]]) -> None:
    """Clean and robust accuracy, and their harmonic mean, against the cost: the seeds' mean, smallest and largest."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    measures = {"clean_accuracy": "clean", "robust_accuracy": "PGD-20", "harmonic_mean": "harmonic mean"}
    for place, (measure, title) in enumerate(measures.items(), 1):
        axes = figure.add_subplot(1, 3, place)
        for name, runs in rows.items():
            marker, colour, label = next(look for start, look in KINDS.items() if name.startswith(start))
            cost = statistics.mean(run["forward_passes"] for run in runs)
            values = [100 * run[measure] for run in runs]
            middle = statistics.mean(values)
            errors = [[middle - min(values)], [max(values) - middle]]
            axes.errorbar(cost, middle, yerr=errors, fmt=marker, color=colour, ecolor=colour, markersize=5,
                          label=label)  # fmt: skip
            axes.annotate(name, (cost, middle), (4, 3), textcoords="offset points", fontsize=5.5, color=DARK)
        axes.set_title(f"{title}, %", fontsize=8, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=7)
        axes.margins(x=0.15)
        if place == 1:
            handles, labels = axes.get_legend_handles_labels()
            unique = dict(zip(labels, handles, strict=True))
            axes.legend(unique.values(), unique.keys(), fontsize=6, frameon=False)
    figure.supxlabel("forward passes an image costs in a step", fontsize=8)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a pretrained network")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--limit-train", type=int)
    parser.add_argument("--limit-eval", type=int)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--rgkd-weight", type=float, default=10.0)
    parser.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--num-workers", type=int)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--variants", help="names separated by semicolons; default: all")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    names = args.variants.split(";") if args.variants else list(VARIANTS)
    if unknown := [name for name in names if name not in VARIANTS]:
        parser.error(f"--variants {'; '.join(unknown)}: none of {'; '.join(VARIANTS)}")
    seeds = [int(seed) for seed in args.seeds.split(",")]
    for seed in seeds:
        for name in names:
            train(args, name, seed)
    rows = {name: [read_run(run_folder(args.output_dir, name, seed)) for seed in seeds] for name in names}
    print(f"{'':<30}{'clean':>8}{'PGD-20':>8}{'harmonic':>10}{'passes':>8}{'images/s':>10}  mean of {len(seeds)} seeds")
    for name, runs in rows.items():
        mean = {key: statistics.mean(run[key] for run in runs) for key in runs[0]}
        print(
            f"{name:<30}{100 * mean['clean_accuracy']:>8.1f}{100 * mean['robust_accuracy']:>8.1f}"
            f"{100 * mean['harmonic_mean']:>10.1f}{mean['forward_passes']:>8.1f}{mean['images_per_second']:>10.1f}"
        )
    if args.output:
        record = {
            "command": "python scripts/benchmarks/cheaper.py " + " ".join(sys.argv[1:]),
            "versions": library_versions(), "seeds": seeds, "rows": rows,
        }  # fmt: skip
        args.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if args.figure:
        draw(args.figure, rows)


if __name__ == "__main__":
    main()
