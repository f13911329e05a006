"""`python -m arrest_hub` with attacks that draw nothing, so that runs on one and on two processes can be compared."""

import sys

from two_processes import steady_attack, steady_noise

from arrest_hub import train
from arrest_hub.cli import finetune_command
from arrest_hub.command import leave, run_cli


def steady_pgd(logits_fn, pixels, labels, *, generator=None, **numbers):
    return steady_attack(logits_fn, pixels, labels)


def steady_ball(pixels, *, generator=None, **numbers):
    return steady_noise(pixels)


if __name__ == "__main__":
    train.pgd, train.random_in_ball = steady_pgd, steady_ball
    leave(run_cli(finetune_command, sys.argv[1:]))
