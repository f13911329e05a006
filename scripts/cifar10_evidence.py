"""What is kept in docs/evidence/ of the runs of reproduce_cifar10.py, read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar10_suites import VARIANTS

from arrest_hub.results import harmonic_mean


@dataclass(frozen=True)
class Row:
    """A run: counts of right images by attack ("clean", "pgd-20", "apgd", "autoattack"), and how it was trained."""

    seed: int
    counts: dict[str, tuple[int, int]]
    run: dict[str, Any]
    hardware: str = ""
    """What it was trained on; of rows kept without it, what it was evaluated on."""

    def share(self, attack: str) -> float | None:
        """The accuracy as a fraction; None where it is not measured."""
        if attack not in self.counts:
            return None
        correct, n = self.counts[attack]
        return correct / n

    def harmonic(self, attack: str) -> float | None:
        """Harmonic mean of clean accuracy and accuracy under an attack; None where that is not measured."""
        clean, robust = self.share("clean"), self.share(attack)
        return None if clean is None or robust is None else harmonic_mean(clean, robust)


def read_row(folder: Path) -> Row:
    """A run's folder under docs/evidence/."""
    report = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    results = report["results"]
    counts = {result["attack"] or "clean": (result["correct"], result["n"]) for result in results}
    if (left := left_by_apgd(results)) is not None:
        counts["apgd"] = left
    run = folder / "run.json"
    seed = folder.name.rpartition("-seed-")[2]
    facts = json.loads(run.read_text()) if run.is_file() else {}
    return Row(int(seed) if seed.isdigit() else 0, counts, facts, facts.get("hardware") or report.get("hardware", ""))


def left_by_apgd(results: Sequence[Mapping[str, Any]]) -> tuple[int, int] | None:
    """Images that APGD-CE and then APGD-T leave right, and of how many: AutoAttack's first two parts, or these two
    alone after PGD. None where neither was run."""
    by_attack = {result["attack"]: result for result in results}
    if whole := by_attack.get("autoattack"):
        parts = whole.get("attack_parameters", {}).get("parts", [])
        broken_later = sum(part["broken"] for part in parts if not part["name"].startswith("apgd-"))
        return (whole["correct"] + broken_later, whole["n"]) if parts else None
    half = by_attack.get("apgd-t")
    if half is None or "apgd-ce" not in half["attack_parameters"].get("after", []):
        return None
    return half["correct"], half["n"]


def read_suite(folder: Path) -> dict[str, list[Row]]:
    """By variant, the runs of a suite, in the order of the seeds."""
    found = {
        key: [read_row(folder / name) for seed in variant.seeds if (folder / (name := f"{key}-seed-{seed}")).is_dir()]
        for key, variant in VARIANTS.items()
    }
    return {key: rows for key, rows in found.items() if rows}
