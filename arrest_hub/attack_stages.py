"""The attacks of an evaluation by name: what each does to a batch, and the stages it runs in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arrest_hub.attacks import LogitsFn, pgd, random_in_ball
from arrest_hub.autoattack import AutoAttackParts, library, standard_parts
from arrest_hub.evaluator import Attacked, AttackFn, Evaluator, StageOutcome
from arrest_hub.results import pgd_parameters
from arrest_hub.seeding import derive_seed


@dataclass(frozen=True)
class ThreatModel:
    """What the attacker may do: perturbations of ``norm`` at most ``eps``, on pixels in [0, 1]."""

    norm: str
    eps: float


@dataclass
class AttackOutcome:
    """``broken_by``: position of an image -> the attack, or the part, that broke it. ``seconds``: see `Result`."""

    broken_by: dict[int, str]
    seconds: float
    parameters: dict[str, Any]
    largest: float = 0.0
    inside: bool = True


def pgd_attack(
    classify: LogitsFn,
    threat: ThreatModel,
    *,
    steps: int,
    step_size: float,
    restarts: int = 1,
    seed: int,
    name: str,
    source: LogitsFn | None = None,
) -> AttackFn:
    """PGD from ``restarts`` random starts: per image, the first start that breaks it counts (the last if none does).

    ``source``: the network whose gradient is followed, if it is not the one attacked (a transfer attack). The random
    starts depend on seed, name, number of the batch and restart alone.
    """
    gradients_of = source or classify

    def run(pixels: Tensor, labels: Tensor, number: int) -> Attacked:
        adversarial = pixels.clone()
        standing = torch.arange(len(pixels), device=pixels.device)
        generator = torch.Generator(device=pixels.device)
        for restart in range(restarts):
            generator.manual_seed(derive_seed(seed, name, number, restart))
            target = labels[standing]
            found = pgd(
                gradients_of,
                pixels[standing],
                target,
                norm=threat.norm,
                eps=threat.eps,
                step_size=step_size,
                steps=steps,
                generator=generator,
            )
            adversarial[standing] = found.adversarial
            if restart + 1 < restarts:
                with torch.no_grad():
                    stands = classify(found.adversarial).argmax(dim=1) == target
                standing = standing[stands]
                if not len(standing):
                    break
        return Attacked(adversarial, {})

    return run


def noise_attack(threat: ThreatModel, *, seed: int, name: str = "noise") -> AttackFn:
    """One draw of uniform noise from the ball around each image."""

    def run(pixels: Tensor, labels: Tensor, number: int) -> Attacked:
        generator = torch.Generator(device=pixels.device).manual_seed(derive_seed(seed, name, number))
        return Attacked(random_in_ball(pixels, eps=threat.eps, norm=threat.norm, generator=generator), {})

    return run


def by_search(evaluator: Evaluator, make: Callable[[LogitsFn], AttackFn]) -> AttackFn:
    """The attack that ``make`` makes of a network, of the one that the evaluator's attacks are to follow.

    What it then finds of an image may fool that one alone, by its rounding, and an attack stops at what it takes for a
    success; or that one's logits may not be finite, and lead nowhere. Such an image is attacked again, following the
    network of the verdicts. So no image stands that was not attacked to the end. Their number is noted as
    ``attacked_again``.
    """
    exact = make(evaluator.classify)
    if evaluator.search is evaluator.classify:
        return exact
    search = make(evaluator.search)

    def run(pixels: Tensor, labels: Tensor, number: int) -> Attacked:
        with evaluator.searching():
            found = search(pixels, labels, number)
            with torch.no_grad():
                logits = evaluator.search(found.adversarial)
        doubtful = (logits.argmax(dim=1) != labels) | ~logits.isfinite().all(dim=1)
        with torch.no_grad():
            again = doubtful & (evaluator.classify(found.adversarial).argmax(dim=1) == labels)
        adversarial = found.adversarial.clone()
        if again.any():
            adversarial[again] = exact(pixels[again], labels[again], number).adversarial
        return Attacked(adversarial, {**found.extra, "attacked_again": int(again.sum())})

    return run


def part_attack(parts: AutoAttackParts, part: str) -> AttackFn:
    """One part of AutoAttack."""
    return lambda pixels, labels, number: Attacked(parts.perturb(part, pixels, labels), {})


def _outcome(name: str, run: StageOutcome, parameters: dict[str, Any]) -> AttackOutcome:
    inside = all(entry["inside"] for entry in run.entries)
    return AttackOutcome(dict.fromkeys(run.broken, name), run.seconds, parameters | _again(run), run.largest, inside)


def _again(run: StageOutcome) -> dict[str, int]:
    """How many images were attacked again, where attacks follow a network of their own."""
    counts = [entry["attacked_again"] for entry in run.entries if "attacked_again" in entry]
    return {"attacked_again": sum(counts)} if counts else {}


def run_attack(
    evaluator: Evaluator,
    name: str,
    positions: Sequence[int],
    *,
    threat: ThreatModel,
    num_classes: int,
    of: int,
    seed: int,
    pgd_step_size: float,
    pgd_restarts: int,
    scope: str = "",
) -> AttackOutcome:
    """Run the attack called ``name`` (noise, pgd-N, autoattack, one of its parts) on the images at ``positions``.

    AutoAttack's parts see only what the parts before them left standing. ``scope`` keeps the stages of several models
    apart. Raises ValueError for an unknown name.
    """
    if name == "noise":
        run = evaluator.attack(scope + name, positions, noise_attack(threat, seed=seed), title=name, passes=1, of=of)
        return _outcome(name, run, {"draws": 1, "distribution": "uniform"})
    if name.startswith("pgd-"):
        steps = int(name.removeprefix("pgd-"))
        attack = by_search(
            evaluator,
            lambda logits_fn: pgd_attack(
                logits_fn, threat, steps=steps, step_size=pgd_step_size, restarts=pgd_restarts, seed=seed, name=name
            ),
        )
        run = evaluator.attack(
            scope + name, positions, attack, title=name.upper(), passes=(steps + 1) * pgd_restarts, of=of
        )
        return _outcome(name, run, pgd_parameters(steps, pgd_step_size, pgd_restarts))
    suites = {
        logits_fn: AutoAttackParts(
            logits_fn, norm=threat.norm, eps=threat.eps, seed=seed, num_classes=num_classes,
            device=evaluator.accelerator.device,
        )
        for logits_fn in (evaluator.classify, evaluator.search)
    }  # fmt: skip
    suite = suites[evaluator.classify]

    def attack_of(part: str) -> AttackFn:
        return by_search(evaluator, lambda logits_fn: part_attack(suites[logits_fn], part))

    chosen, not_run = standard_parts(num_classes) if name == "autoattack" else ([name], {})
    broken_by: dict[int, str] = {}
    standing, records, largest, inside = list(positions), [], 0.0, True
    for number, part in enumerate(chosen):
        title = f"AutoAttack {part} ({number + 1}/{len(chosen)})" if name == "autoattack" else part
        run = evaluator.attack(
            f"{scope}{name}/{part}", standing, attack_of(part), title=title, passes=suite.passes(part), of=of
        )
        broken_by |= dict.fromkeys(run.broken, part)
        broken = set(run.broken)
        standing = [position for position in standing if position not in broken]
        largest = max(largest, run.largest)
        inside = inside and all(entry["inside"] for entry in run.entries)
        record = {"name": part, **suite.parameters(part), "attacked": run.attacked, "broken": len(broken),
                  "seconds": round(run.seconds, 3), **_again(run)}  # fmt: skip
        flags = sorted({warning for entry in run.entries for warning in entry["warnings"]})
        records.append(record | ({"warnings": flags} if flags else {}))
    parameters = {
        "library": library(), "version": "standard", "batch_size": evaluator.batch_size, "parts": records,
        "not_run": [{"name": part, "reason": reason} for part, reason in not_run.items()],
    }  # fmt: skip
    seconds = sum(record["seconds"] for record in records)
    return AttackOutcome(broken_by, seconds, parameters, largest, inside)
