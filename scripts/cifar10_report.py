"""Tables of docs/results.md, from the results.json files in docs/evidence/ and from nothing else."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from cifar10_evidence import Row, read_suite
from cifar10_figures import draw_drift, draw_tradeoff
from cifar10_suites import SHORT, SUITES, VARIANTS

BEGIN, END = "<!-- {0}: made by scripts/reproduce_cifar10.py --report -->", "<!-- end of {0} -->"


def spread(values: Sequence[float | None], digits: int = 1) -> str:
    """Per cent: the mean, and in brackets the smallest and the largest where there are several; "–" for none."""
    known = [100 * value for value in values if value is not None]
    if not known:
        return "–"
    text = f"{statistics.mean(known):.{digits}f}"
    return text if len(known) == 1 else f"{text} ({min(known):.{digits}f}–{max(known):.{digits}f})"


def hardware_marks(rows: Mapping[str, Sequence[Row]]) -> dict[str, str]:
    """A mark behind minutes for each machine of a suite: none for that of most runs, then *, ** and so on."""
    places = Counter(run.hardware for runs in rows.values() for run in runs).most_common()
    return {place: "*" * number for number, (place, _) in enumerate(places)}


def minutes_text(runs: Sequence[Row], marks: Mapping[str, str]) -> str:
    """Mean minutes by machine, each with its mark: times of two machines have no mean."""
    times = {mark: [run.run["train_minutes"] for run in runs if run.hardware == place] for place, mark in marks.items()}
    return ", ".join(f"{statistics.mean(minutes):.1f}{mark}" for mark, minutes in times.items() if minutes)


def table(rows: Mapping[str, Sequence[Row]], keys: Iterable[str]) -> list[str]:
    """A line for each variant that was run."""
    lines = [
        "| | seeds | clean | PGD-20 | APGD | AutoAttack | H (PGD-20) | H (APGD) | H (AutoAttack) | passes | minutes "
        "| runs |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: | --- |",
    ]
    for key in keys:
        if key not in rows:
            continue
        runs = rows[key]
        shares = [spread([run.share("clean") for run in runs])]
        means = []
        for attack in ("pgd-20", "apgd", "autoattack"):
            attacked = [run for run in runs if attack in run.counts]
            few = f" of {len(attacked)}" if 0 < len(attacked) < len(runs) else ""
            shares.append(spread([run.share(attack) for run in attacked]) + few)
            means.append(spread([run.harmonic(attack) for run in attacked]))
        minutes = minutes_text(runs, hardware_marks(rows))
        lines.append(
            f"| {VARIANTS[key].title} | {len(runs)} | {' | '.join(shares + means)} "
            f"| {runs[0].run['passes']} | {minutes} | `{key}` |"
        )
    return lines


def hardware_text(rows: Mapping[str, Sequence[Row]]) -> list[str]:
    """What stars behind minutes mean; nothing where all runs were made on one machine."""
    usual, *others = ((place, mark.replace("*", "\\*")) for place, mark in hardware_marks(rows).items())
    texts = "".join(f"; with {mark}, of {place}" for place, mark in others)
    return [f"Minutes are of {usual[0]}{texts}.", ""] if others else []


def apgd_text(rows: Mapping[str, Sequence[Row]]) -> list[str]:
    """How far APGD stands for AutoAttack: what the other two attacks broke where all four were run."""
    both = [run.counts for runs in rows.values() for run in runs if {"apgd", "autoattack"} <= set(run.counts)]
    if not both:
        return []
    left = sum(counts["apgd"][0] for counts in both)
    broken = left - sum(counts["autoattack"][0] for counts in both)
    return [
        f"APGD is the first half of standard AutoAttack, APGD-CE and then APGD-T; alone, on what PGD-20 left. Of the "
        f"{left:,} images that it left on {len(both)} network{'s' * (len(both) > 1)}, the other half, FAB-T and "
        f"Square, broke {broken:,}.",
        "",
    ]


SWEPT = ("best", "aft", "trades", "at")
"""Variants whose learning rate is swept."""


def by_method_and_rate(key: str) -> tuple[int, float]:
    """Where a variant of a CPU's suite stands in the table of learning rates."""
    return SWEPT.index(key.partition("-lr-")[0]), float(VARIANTS[key].flags.get("lr", SHORT["lr"]))


def in_table(group: str) -> list[str]:
    """The variants of a group, beside those that they are compared with, in the order of the table."""
    keys = [key for key, variant in VARIANTS.items() if variant.group == group]
    match group:
        case "main":
            return keys
        case "recipe":
            return ["best", *keys]
        case "lambda":  # the recipe is the sweep's λ 100
            return ["arrest", *keys[: keys.index("lambda-300")], "best", *keys[keys.index("lambda-300") :]]
        case "lr":
            return sorted((*SWEPT, *keys), key=by_method_and_rate)
        case "precision":  # each below its own in bf16
            return [name for key in keys for name in (key.removesuffix("-fp32"), key)]
        case "parts":  # what they are added to comes first
            added_to = ["trades-lr-0.04-fp32", "aft-lr-0.04-fp32", "best-lr-0.04-no-replay-fp32", "best-lr-0.04-fp32"]
            return [*added_to, *(key for key in keys if key not in added_to)]
        case _:
            return ["arrest", *keys]


def suite_text(name: str, folder: Path) -> list[str]:
    """The tables of a suite."""
    rows = read_suite(folder)
    lines = apgd_text(rows) + hardware_text(rows)
    titles = {
        "main": "Methods", "ablation": "Ingredients, each added to ARREST",
        "recipe": "Added to the recipe (λ 100), or changed in it", "choices": "What was chosen",
        "lambda": "λ", "tau": "τ", "lr": "Learning rate, 0.02 where not said",
        "precision": "Precision of the training, bf16 where not said",
        "parts": "Part by part at a learning rate of 0.04, in fp32",
    }  # fmt: skip
    shown = {group: {key for key in in_table(group) if key in rows} for group in titles}
    for group, title in titles.items():
        told = any(shown[group] < other for other in shown.values())  # all of it stands in another table
        if not told and any(VARIANTS[key].group == group for key in shown[group]):
            lines += [f"**{title}**", "", *table(rows, in_table(group)), ""]
    return lines


def write_report(evidence: Path, docs: Path) -> None:
    """Replace the generated parts of docs/results.md, and draw docs/figures/{tradeoff,drift}.png.

    Raises ValueError if a part has no place in docs/results.md.
    """
    path = docs / "results.md"
    text = path.read_text(encoding="utf-8")
    for name in SUITES:
        if not (evidence / name).is_dir():
            continue
        begin, end = BEGIN.format(name), END.format(name)
        if begin not in text or end not in text:
            raise ValueError(f"{path} has no place for the suite {name!r}: add the lines {begin} and {end}.")
        before, _, rest = text.partition(begin)
        text = "\n".join([before + begin, "", *suite_text(name, evidence / name), end + rest.partition(end)[2]])
    path.write_text(text, encoding="utf-8")
    suites = {name: read_suite(evidence / name) for name in SUITES if (evidence / name).is_dir()}
    if suites.get("narrow"):
        draw_tradeoff(docs / "figures" / "tradeoff.png", suites)
        draw_drift(docs / "figures" / "drift.png", suites["narrow"])
