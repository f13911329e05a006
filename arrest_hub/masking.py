"""Is it really robust, or does the attack fail? Signs of gradient masking (Athalye et al. 2018, arXiv 1802.00420;
Carlini et al. 2019, arXiv 1902.06705), each measured on correctly classified images and judged by a fixed threshold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from arrest_hub.attack_stages import AttackOutcome, ThreatModel, noise_attack, part_attack, pgd_attack
from arrest_hub.attacks import LogitsFn, random_in_ball
from arrest_hub.autoattack import AutoAttackParts, model_flags, square_flag
from arrest_hub.evaluator import Attacked, AttackFn, Evaluator
from arrest_hub.results import CHANCE, TRANSFER, Check, wilson_interval
from arrest_hub.seeding import derive_seed

SQUARE_QUERIES = 500
SLACK = 0.01
"""Differences up to this share of the images are chance, not masking."""
UNBOUNDED_LIMIT = 0.05
UNBOUNDED_RESTARTS = 5
ZERO_GRADIENT_LIMIT = 0.05
SQUARE_LIMIT = 0.02
LOOSE_LIMIT = 0.05
"""More of the images than this may not fall to the checks' attacks and stand those that are reported."""
TINY = 1e-4
"""A change of the pixels that no network that is worth attacking answers with much."""
TINY_LIMIT = {"fp32": 0.03, "tf32": 0.1, "bf16": 0.3}
"""Of the logits' size: trained networks were seen to change by up to 0.005 of it in fp32 and 0.09 in bf16, which rounds
as much; logits that jump change by about 1."""
BATCH_LIMIT = {"fp32": 1e-3, "tf32": 0.03, "bf16": 0.1}
"""How much the logits may depend on the batch, of their size: what arithmetic alone makes of it."""


@dataclass(frozen=True)
class CheckSettings:
    """``steps`` and ``step_size``: of the PGD that is judged. The comparison runs three times as many. ``autoattack``:
    whether AutoAttack was run in full, with Square."""

    threat: ThreatModel
    steps: int
    step_size: float
    seed: int
    num_classes: int
    autoattack: bool = False

    @property
    def more_steps(self) -> int:
        return 3 * self.steps


def unbounded_eps(norm: str, dimensions: int) -> float:
    """A radius within which every image in [0, 1] can be turned into one and the same grey image."""
    return {"linf": 0.5, "l2": 0.5 * math.sqrt(dimensions), "l1": 0.5 * dimensions}[norm]


def judged(name: str, passed: bool, value: float, finding: str, warning: str) -> Check:
    """A check whose warning is added to the finding unless it ``passed``."""
    return Check(name, "pass" if passed else "warn", round(value, 6), finding if passed else f"{finding} {warning}")


def share_check(name: str, value: float, limit: float, finding: str, warning: str) -> Check:
    """Pass if ``value`` is at most ``limit``."""
    return judged(name, value <= limit + 1e-9, value, finding, warning)  # of counts, whose difference is rounded


def chance_check(correct: int, n: int, num_classes: int) -> Check:
    """Whether clean accuracy is above chance: if not, the pixels or the labels are probably not the model's."""
    low, _ = wilson_interval(correct, n)
    finding = f"Clean accuracy is {100 * correct / n:.1f} % on {n:,} images of {num_classes} classes."
    warning = (
        "That is no better than chance: the model probably wants normalised input (it must take pixels in [0, 1] and "
        "normalise inside), or its classes are numbered otherwise (see --label-match)."
    )
    return judged(CHANCE, low > 1 / num_classes, correct / n, finding, warning)


def ball_check(outcomes: dict[str, AttackOutcome], eps: float) -> Check:
    """Whether what broke the images is inside the ball and in [0, 1]: otherwise the attack, not the model, failed."""
    largest = max((outcome.largest for outcome in outcomes.values()), default=0.0)
    inside = all(outcome.inside for outcome in outcomes.values())
    finding = f"The largest perturbation that broke an image is {largest / eps:.4f} eps"
    finding += ", all pixels in [0, 1]." if inside else ", and some pixels are outside [0, 1]."
    warning = "Examples outside the threat model make the model look weaker than it is: please report this as a bug."
    passed = inside and largest <= eps * 1.001
    return judged("adversarial examples inside the ball", passed, largest / eps, finding, warning)


def autoattack_checks(outcomes: dict[str, AttackOutcome], n: int, clean: int) -> list[Check]:
    """What the figures themselves tell: AutoAttack against PGD, and AutoAttack's own flags on Square and gradients."""
    checks = []
    auto = outcomes.get("autoattack")
    if auto is None:
        return []
    for name, outcome in outcomes.items():
        if name.startswith("pgd-"):
            missed = len(set(outcome.broken_by) - set(auto.broken_by)) / n
            checks.append(
                share_check(
                    f"AutoAttack is no weaker than {name.upper()}",
                    missed,
                    SLACK / 2,
                    f"{100 * missed:.2f} % of the images fall to {name.upper()} and not to AutoAttack.",
                    "AutoAttack's gradients may be masked (saturated cross-entropy, say): its figure is too high.",
                )
            )
    standing, correct = clean, {"clean": clean}
    for part in auto.parameters["parts"]:
        standing -= part["broken"]
        correct[part["name"]] = standing
    if "square" in correct:
        drop = (min(count for part, count in correct.items() if part != "square") - correct["square"]) / n
        finding = f"Square alone lowers AutoAttack's accuracy by {100 * drop:.2f} points."
        warning = "A black-box attack finds what gradients do not: the gradients may be masked."
        checks.append(judged("AutoAttack's flag: Square", not square_flag(correct, n), drop, finding, warning))
    warned_parts = [part["name"] for part in auto.parameters["parts"] if part.get("warnings")]
    finding = "Its gradients are never zero." if not warned_parts else f"Zero gradients in {', '.join(warned_parts)}."
    checks.append(
        Check("AutoAttack's flag: zero gradients", "warn" if warned_parts else "pass", len(warned_parts), finding)
    )
    return checks


def gradient_probe(classify: LogitsFn, threat: ThreatModel, seed: int) -> AttackFn:
    """Counts images whose cross-entropy has a gradient of exactly zero, or NaN, at a random point of the ball."""

    def run(pixels: Tensor, labels: Tensor, number: int) -> Attacked:
        generator = torch.Generator(device=pixels.device).manual_seed(derive_seed(seed, "gradients", number))
        point = random_in_ball(pixels, eps=threat.eps, norm=threat.norm, generator=generator).requires_grad_(True)
        with torch.enable_grad():
            logits = classify(point)
            if not logits.requires_grad:  # cut off from the pixels altogether
                return Attacked(pixels, {"zero": len(pixels)})
            (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), point)
        return Attacked(pixels, {"zero": int((gradient.nan_to_num(nan=0.0) == 0).flatten(1).all(dim=1).sum())})

    return run


def masking_checks(
    evaluator: Evaluator,
    positions: Sequence[int],
    settings: CheckSettings,
    *,
    teacher: Evaluator | None,
    first_batch: tuple[Tensor, Tensor],
    pixels_per_image: int,
    gradients: bool = True,
    reported: tuple[str, set[int]] | None = None,
) -> list[Check]:
    """Attack the correctly classified images at ``positions`` in several ways and compare what breaks them.

    ``teacher``: a standard network from which adversarial examples are transferred. ``first_batch``: pixels and labels
    for the checks of the model itself. Norm l1 has no PGD here: its gradient checks are skipped, as are those of a
    model without ``gradients`` to the pixels. ``reported``: the strongest attack whose figure is given, and what it
    broke.
    """
    threat, seed, n = settings.threat, settings.seed, len(positions)
    with evaluator.ready():
        checks = [*_model_flags(evaluator, first_batch), *_consistency(evaluator, first_batch[0], seed)]
    if not n:
        return [*checks, _skipped("gradient masking", "no image is classified correctly")]
    if threat.norm == "l1":
        return [*checks, _skipped("gradient masking", "the checks need PGD, which has linf and l2 only")]
    if not gradients:
        return [*checks, _skipped("gradient masking", "the model gives no gradients to look at")]

    def broken(stage: str, attack: AttackFn, passes: int, where: Sequence[int] = positions) -> Any:
        return evaluator.attack(f"check/{stage}", where, attack, title=f"check: {stage}", passes=passes, of=n)

    def gradient_attack(steps: int, **changes: Any) -> AttackFn:
        values: dict[str, Any] = {"threat": threat, "step_size": settings.step_size} | changes
        # the same name, so the same random start
        return pgd_attack(evaluator.classify, steps=steps, seed=seed, name="check", **values)

    white = set(broken(f"PGD-{settings.steps}", gradient_attack(settings.steps), settings.steps + 1).broken)
    more = set(
        broken(f"PGD-{settings.more_steps}", gradient_attack(settings.more_steps), settings.more_steps + 1).broken
    )
    robust, robust_more = 1 - len(white) / n, 1 - len(more) / n
    checks.append(
        share_check(
            "more steps are never weaker",
            robust_more - robust,
            SLACK,
            f"{100 * robust:.1f} % stand PGD-{settings.steps}, {100 * robust_more:.1f} % PGD-{settings.more_steps} "
            f"({n} images).",
            "More steps break fewer images: the loss surface misleads the gradient.",
        )
    )
    wide = unbounded_eps(threat.norm, pixels_per_image)
    unbounded = ThreatModel(threat.norm, wide)
    # several starts and small steps: in so large a ball the sign of the gradient may run into a corner
    attack = gradient_attack(settings.more_steps, threat=unbounded, step_size=wide / 10, restarts=UNBOUNDED_RESTARTS)
    run = broken("large eps", attack, UNBOUNDED_RESTARTS * (settings.more_steps + 1))
    left = 1 - len(run.broken) / n
    checks.append(
        share_check(
            "robust accuracy falls to 0 as eps grows",
            left,
            UNBOUNDED_LIMIT,
            f"{100 * left:.1f} % of {n} images stand PGD-{settings.more_steps} at {threat.norm} {wide:.3g}, where "
            "every image can be made grey.",
            "An attack that may do anything must succeed: the gradients are of no use to it.",
        )
    )
    noisy = broken("noise", noise_attack(threat, seed=seed, name="check noise"), 1)
    stands_noise = 1 - len(noisy.broken) / n
    checks.append(
        share_check(
            "noise does not hurt more than PGD",
            min(robust, robust_more) - stands_noise,
            SLACK,
            f"{100 * stands_noise:.1f} % of {n} images stand uniform noise, "
            f"{100 * min(robust, robust_more):.1f} % PGD.",
            "Blind noise breaks more than the gradient does: the gradient misleads.",
        )
    )
    fallen = white | more
    if not settings.autoattack:  # which has its own, with all queries on all images
        check, broken_too = _square_check(evaluator, positions, white | more, settings)
        checks.append(check)
        fallen |= broken_too
    check, broken_too = _transfer_check(evaluator, positions, white | more, settings, teacher)
    checks.append(check)
    fallen |= broken_too
    if reported is not None:
        checks.append(_loose_check(reported, fallen, n))
    probe = broken("gradients", gradient_probe(evaluator.classify, threat, seed), 1)
    zero = sum(entry["zero"] for entry in probe.entries) / n
    checks.append(
        share_check(
            "share of zero gradients",
            zero,
            ZERO_GRADIENT_LIMIT,
            f"{100 * zero:.1f} % of {n} images have a cross-entropy gradient of exactly zero.",
            "Saturated or non-differentiable outputs: attacks that follow cross-entropy cannot work.",
        )
    )
    return checks


def _loose_check(reported: tuple[str, set[int]], fallen: set[int], n: int) -> Check:
    """What the checks broke, though the strongest attack that is reported did not."""
    name, broken = reported
    count = len(fallen - broken)
    if name == "autoattack":
        warning = "Its figure is too high: the gradients that it follows may be masked."
    else:
        warning = f"{name.upper()}'s figure is too high: measure with autoattack."
    return share_check(
        f"the checks break little that stands {name.upper()}", count / n, max(LOOSE_LIMIT, 1 / n),  # one is chance
        f"{100 * count / n:.1f} % of {n} images stand {name.upper()} and fall to an attack of these checks.", warning,
    )  # fmt: skip


def _consistency(evaluator: Evaluator, pixels: Tensor, seed: int) -> list[Check]:
    """Whether the logits are a steady function of one image: else an image that stands may fall the next time."""
    generator = torch.Generator(device=pixels.device).manual_seed(derive_seed(seed, "tiny change"))
    signs = torch.randint(0, 2, pixels.shape, generator=generator, device=pixels.device) * 2 - 1
    with torch.no_grad():
        logits = evaluator.classify(pixels)
        moved = evaluator.classify((pixels + TINY * signs).clamp(0, 1))
        alone = torch.cat([evaluator.classify(half) for half in pixels.chunk(2)])
    size = (logits - logits.mean(dim=1, keepdim=True)).norm(dim=1).clamp_min(1e-30)
    change, dependence = (float(((other - logits).norm(dim=1) / size).mean()) for other in (moved, alone))
    return [
        share_check(
            "a tiny change of the pixels changes the logits little", change, TINY_LIMIT[evaluator.precision],
            f"Changing every pixel by {TINY:g} changes the logits by {100 * change:.2g} % of their size.",
            "They jump: what the model does to an image (hashing, random numbers seeded by it, rounding) hides it from "
            "gradients. Its figures are too high.",
        ),
        share_check(
            "an image's logits do not depend on its batch", dependence, BATCH_LIMIT[evaluator.precision],
            f"In batches of half the size the logits differ by {100 * dependence:.2g} % of their size.",
            "Verdicts depend on what is in the batch (BatchNorm without running statistics, say), and attacks change "
            "that: the figures are of no model that sees one image.",
        ),
    ]  # fmt: skip


def _square_check(
    evaluator: Evaluator, positions: Sequence[int], white: set[int], settings: CheckSettings
) -> tuple[Check, set[int]]:
    """Square against everything that gradients give, PGD, and APGD on what it left; and what both broke."""
    threat, n = settings.threat, len(positions)
    suite = AutoAttackParts(
        evaluator.classify, norm=threat.norm, eps=threat.eps, seed=settings.seed, num_classes=settings.num_classes,
        device=evaluator.accelerator.device,
    )  # fmt: skip
    suite.suite.square.n_queries = SQUARE_QUERIES
    standing = [position for position in positions if position not in white]
    gradient_part = "apgd-dlr" if settings.num_classes >= 3 else "apgd-ce"
    only = 0.0
    for part in (gradient_part, "square"):
        run = evaluator.attack(
            f"check/{part}", standing, part_attack(suite, part), title=f"check: {part}", passes=suite.passes(part), of=n
        )
        standing = sorted(set(standing) - set(run.broken))
        only = len(run.broken) / n
    check = share_check(
        "white-box beats black-box", only, SQUARE_LIMIT,
        f"Square ({SQUARE_QUERIES} queries, no gradients) breaks {100 * only:.1f} % of {n} images, which "
        f"PGD-{settings.more_steps} and {gradient_part.upper()} leave standing.",
        "A black-box attack should find nothing that gradients miss: they may be masked.",
    )  # fmt: skip
    return check, set(positions) - white - set(standing)


def _transfer_check(
    evaluator: Evaluator,
    positions: Sequence[int],
    white: set[int],
    settings: CheckSettings,
    teacher: Evaluator | None,
) -> tuple[Check, set[int]]:
    if teacher is None:
        return _skipped(TRANSFER, "no teacher is known (--teacher names one)"), set()
    attack = pgd_attack(
        evaluator.classify, settings.threat, steps=settings.steps, step_size=settings.step_size, seed=settings.seed,
        name="check transfer", source=teacher.classify,
    )  # fmt: skip
    with teacher.ready():
        run = evaluator.attack(
            "check/transfer", positions, attack, title="check: transfer", passes=2, of=len(positions)
        )
    stands, own = 1 - len(run.broken) / len(positions), 1 - len(white) / len(positions)
    check = share_check(
        TRANSFER, own - stands, SLACK,
        f"{100 * stands:.1f} % of {len(positions)} images stand examples made on the teacher, {100 * own:.1f} % those "
        "made on the model.",
        "Examples made for another network hurt more than the model's own: its gradients are masked.",
    )  # fmt: skip
    return check, set(run.broken)


def _model_flags(evaluator: Evaluator, first_batch: tuple[Tensor, Tensor]) -> list[Check]:
    found = model_flags(evaluator.classify, *first_batch)
    sentences = {
        "randomized": ("The same images give the same logits twice.",
                       "The outputs are random: gradients must be averaged (AutoAttack's version 'rand'), which this "
                       "evaluation does not do. Its figures are too high."),
        "probabilities": ("The outputs are logits.",
                          "The outputs are probabilities: gradients of a second softmax vanish. Return logits."),
        "dynamic": ("The network does not optimise at test time.",
                    "The network computes gradients when it classifies: a defence of this kind needs its own attack."),
    }  # fmt: skip
    return [
        Check(f"AutoAttack's flag: {name}", "warn" if messages else "pass", float(bool(messages)),
              sentences[name][1 if messages else 0])
        for name, messages in found.items()
    ]  # fmt: skip


def _skipped(name: str, reason: str) -> Check:
    return Check(name, "skipped", None, f"Not measured: {reason}.")
