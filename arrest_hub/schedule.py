"""What depends on how much of the training is done: the learning rate, and when averaging of the weights begins."""

from __future__ import annotations

import torch
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler

from arrest_hub.config import FinetuneConfig
from arrest_hub.errors import ConfigError

POLY_POWER = 1.0
"""Of --scheduler poly, as PyTorch's PolynomialLR and transformers have it."""


class Schedule:
    """The schedule of a phase over ``total_steps``.

    Args:
        optimizer: new, at its peak learning rate; a checkpoint is loaded into it afterwards.
        epoch_steps: steps of an epoch, for what is given in epochs; None: unknown, and then nothing may be.
        robust: whether this is the robust phase, whose learning rate --lr-hold holds.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        epoch_steps: int | None,
        *,
        robust: bool,
    ) -> None:
        self.optimizer = optimizer
        self.warmup = min(round(config.warmup_epochs * (epoch_steps or 0)), total_steps - 1)
        # timm copies the weights one step longer
        self.average_after = max(0, round(config.ema_start_epoch * (epoch_steps or 0)) - 1)
        self.hold = config.lr_hold if robust else None
        self._scheduler = make_scheduler(config, optimizer, total_steps, self.warmup)

    def set_learning_rate(self, place: int) -> None:
        """Set the optimizer's learning rate to the one after ``place`` steps."""
        self._scheduler.step_update(place)
        if self.hold is not None and place >= self.warmup:
            hold_learning_rate(self.optimizer, self.hold)


def make_scheduler(
    config: FinetuneConfig, optimizer: torch.optim.Optimizer, total_steps: int, warmup: int
) -> Scheduler:
    """The configured learning rate schedule, timm's, over ``total_steps``, the first ``warmup`` of them rising; call
    ``step_update`` after every step."""
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=config.scheduler,
        num_epochs=total_steps,  # counted in steps, so that --max-steps and a fractional warm-up just work
        updates_per_epoch=1,
        step_on_epochs=False,
        warmup_epochs=warmup,
        warmup_lr=0.0,
        warmup_prefix=False,
        min_lr=config.min_lr,
        decay_epochs=max(1, total_steps // 3),
        # timm is a step early
        decay_milestones=[round(total_steps * share) + 1 for share in (0.5, 0.75)],
        # timm takes poly's power from here, too: its default of 0.1 would hardly let the learning rate fall
        decay_rate=POLY_POWER if config.scheduler == "poly" else 0.1,
    )
    return scheduler


def hold_learning_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Raise a learning rate that has fallen below this share of its peak to it.

    A constant learning rate is what averaging the weights is for (Izmailov et al. 2018, arXiv 1803.05407, section 3.2).
    """
    for group in optimizer.param_groups:
        group["lr"] = max(group["lr"], share * group["initial_lr"] * group.get("lr_scale", 1.0))


def check_accumulation(accumulated: int, batches: int) -> None:
    """Raises ConfigError where the batches that an epoch has in each process are too few for one step."""
    if batches < accumulated:
        raise ConfigError(
            f"--grad-accum-steps {accumulated} is more than the {batches} batches of an epoch in each process: give "
            "fewer, or a smaller --batch-size."
        )


def length_problems(config: FinetuneConfig, images: int | None, processes: int) -> list[str]:
    """What does not fit the number of training images (None: a stream of unknown length): a line for each.

    A run that goes on keeps the steps that it began with, and is not asked again.
    """
    problems = []
    if images is None:
        if processes > 1:
            problems.append(
                f"--streaming: the number of training images is not known, so {processes} processes cannot agree on "
                "the length of an epoch. Give --limit-train N."
            )
        if config.max_steps is None:
            problems.append("--streaming: the number of training images is not known, so give --max-steps.")
        if config.standard_epochs:
            problems.append(
                "--streaming: the number of training images is not known, so --standard-epochs has no length."
            )
        for name, value in (("warmup-epochs", config.warmup_epochs), ("ema-start-epoch", config.ema_start_epoch)):
            if value and not config.resume:
                problems.append(
                    f"--{name} {value:g}: the length of the stream, and so of an epoch, is unknown. Give --limit-train "
                    "N, or 0 here."
                )
    elif config.max_steps and config.ema_start_epoch and config.batch_size != "auto" and not config.resume:
        epoch = images // processes // config.batch_size // config.grad_accum_steps
        start = round(config.ema_start_epoch * epoch)
        if start >= config.max_steps:
            problems.append(
                f"--ema-start-epoch {config.ema_start_epoch:g} is step {start}, and the training ends at "
                f"--max-steps {config.max_steps}: give fewer epochs, or more steps."
            )
    return problems
