"""The bar chart of the README, from what step.py wrote.

    python scripts/benchmarks/figure.py scripts/benchmarks/results/step_*.json --output docs/figures/step.png

A panel for each file: images/s relative to the plain loop's in the same run, the median of the repeats' ratios, with
the smallest and the largest as a line.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from arrest_hub.figures import BLUE, DARK, DPI, GREY

ROWS = ("plain loop", "foolbox", "robustness (written out)", "torchattacks", "ours")


def panel(axes: Any, record: dict[str, Any]) -> None:
    """The rows of one file."""
    names = [name for name in ROWS if name in record["rows"]]
    for place, name in enumerate(names):
        ratio = record["rows"][name]["times_plain loop"]
        middle = ratio["median"]
        errors = [[middle - ratio["min"]], [ratio["max"] - middle]]
        axes.barh(place, middle, color=BLUE if name == "ours" else GREY, xerr=errors, ecolor=DARK, height=0.7)
        axes.text(ratio["max"] + 0.03, place, f"{middle:.2f}", va="center", fontsize=8)
    axes.set_yticks(range(len(names)), [name.replace(" (written out)", "") for name in names], fontsize=8)
    axes.set_xlim(0, 1.15 * max(record["rows"][name]["times_plain loop"]["max"] for name in names))
    precision = {"no": "fp32"}.get(record["mixed_precision"], record["mixed_precision"])
    title = f"{record['model']}, {record['image_size']} px, batch {record['batch_size']}, {precision}"
    axes.set_title(title, fontsize=8, loc="left")
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    records = [json.loads(path.read_text()) for path in args.files]
    rows = (len(records) + 1) // 2
    figure = Figure(figsize=(8, 1.9 * rows), layout="constrained")
    for place, record in enumerate(records, 1):
        panel(figure.add_subplot(rows, 2, place), record)
    hardware = sorted({f"{record['processor']}, {record['hardware']}" for record in records})
    figure.supxlabel(
        f"images/s, the plain PyTorch loop = 1 (PGD-{records[0]['attack_steps']}; {'; '.join(hardware)})", fontsize=8
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=DPI, metadata={"Software": None})


if __name__ == "__main__":
    main()
