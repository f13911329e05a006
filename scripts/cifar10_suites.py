"""What reproduce_cifar10.py runs: networks, budgets, and the variants that are compared at one budget.

A suite is a network and a budget; a variant is what differs from `--method arrest` as the suite has it. Nothing here is
measured: figures are in docs/evidence/ and docs/results.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Flags = dict[str, Any]


@dataclass(frozen=True)
class Suite:
    """A network and the budget at which all of its variants are trained and attacked."""

    title: str
    recipe: str
    """The recipe whose values are the suite's."""
    model: Flags
    teacher: Flags
    budget: Flags
    evaluation: Flags
    """Flags of arrest-eval: images, and what makes it fast on the hardware."""


@dataclass(frozen=True)
class Variant:
    """A row of the tables: how it is called, what it changes, how often it is trained."""

    title: str
    flags: Flags
    seeds: tuple[int, ...] = (0,)
    group: str = "ablation"
    """"main" (the table of methods), "ablation", "recipe", "choices", "lambda", "tau", "lr", "precision" or "parts"."""


SHORT: Flags = {
    "epochs": 3, "limit_train": 10000, "attack_steps": 3, "batch_size": 64, "lr": 0.02, "mixed_precision": "bf16",
    "num_workers": 0,
}  # fmt: skip
"""What a core does in some minutes: enough to rank the parts."""
ON_CPU: Flags = {"limit_eval": 1000, "batch_size": 32, "channels_last": True, "compile": True, "num_workers": 0}
# verdicts stay in fp32; what is attacked at a time is begun anew in the next slot
ON_GPU: Flags = {"batch_size": 250, "channels_last": True, "attack_precision": "tf32", "fold_batchnorm": True}

SUITES = {
    "narrow": Suite(
        title="a quarter of ResNet-18's width, on a CPU",
        recipe="default",
        model={"model": "resnet18_cifar", "model_args": "channels=[16,32,64,128]"},
        teacher={"standard_epochs": 15, "standard_lr": 0.1, "batch_size": 128},
        budget=SHORT,
        evaluation=ON_CPU,
    ),
    "narrow_long": Suite(
        title="a quarter of ResNet-18's width, five epochs of all of CIFAR-10, on a CPU",
        recipe="default",
        model={"model": "resnet18_cifar", "model_args": "channels=[16,32,64,128]"},
        teacher={"standard_epochs": 15, "standard_lr": 0.1, "batch_size": 128},
        budget={name: value for name, value in SHORT.items() if name != "limit_train"} | {"epochs": 5},
        evaluation=ON_CPU,
    ),
    "narrow_few": Suite(
        title="a quarter of ResNet-18's width, 25 epochs of 10,000 images, on a CPU",
        recipe="default",
        model={"model": "resnet18_cifar", "model_args": "channels=[16,32,64,128]"},
        teacher={"standard_epochs": 15, "standard_lr": 0.1, "batch_size": 128},
        budget=SHORT | {"epochs": 25},
        evaluation=ON_CPU,
    ),
    "resnet18": Suite(
        title="ResNet-18",
        recipe="cifar10_resnet18",
        model={"model": "resnet18_cifar"},
        teacher={"standard_epochs": 100, "standard_lr": 0.1},
        budget={},
        evaluation=ON_GPU,
    ),
    "resnet18_short": Suite(
        title="ResNet-18, the narrow network's budget, on a CPU",
        recipe="default",
        model={"model": "resnet18_cifar"},
        teacher={"standard_epochs": 15, "standard_lr": 0.1, "batch_size": 128},
        budget=SHORT,
        evaluation=ON_CPU,
    ),
    "resnet18_cpu": Suite(
        title="ResNet-18, three epochs of all of CIFAR-10, on a CPU",
        recipe="default",
        model={"model": "resnet18_cifar"},
        teacher={"standard_epochs": 15, "standard_lr": 0.1, "batch_size": 128},
        budget={name: value for name, value in SHORT.items() if name != "limit_train"},
        evaluation=ON_CPU,
    ),
    "wrn34_10": Suite(
        title="WideResNet-34-10",
        recipe="cifar10_wrn34_10",
        model={"model": "wide_resnet34_10_cifar"},
        teacher={"standard_epochs": 100, "standard_lr": 0.1},
        budget={},
        evaluation=ON_GPU,
    ),
}  # fmt: skip

THREE = (0, 1, 2)
METHOD: Flags = {"rgkd_weight": 10, "replay_threshold": 0.25}
"""What variants change, whatever the suite's recipe has."""
BEST: Flags = {"rgkd_weight": 100}
"""What the recipes for CIFAR-10 change of the method: λ, by the narrow network's sweep."""

FP32: Flags = BEST | {"lr": 0.04, "mixed_precision": "no"}
"""The recipe at its best learning rate for three epochs, as a CPU without bf16 trains it."""

VARIANTS = {
    "at": Variant("AT, from nothing", {"method": "at", "init": "random"}, THREE, "main"),
    "trades": Variant("TRADES, finetuned", {"method": "trades"}, THREE, "main"),
    "aft": Variant("AFT", {"method": "at"}, THREE, "main"),
    "arrest": Variant("ARREST (λ 10, τ 0.25)", {}, THREE, "main"),
    "best": Variant("ARREST, the recipe (λ 100)", BEST, THREE, "main"),
    "trades-scratch": Variant("TRADES, from nothing", {"method": "trades", "init": "random"}),
    "trades-beta-1": Variant("TRADES, finetuned, β 1", {"method": "trades", "trades_beta": 1}),
    "trades-beta-3": Variant("TRADES, finetuned, β 3", {"method": "trades", "trades_beta": 3}),
    "rgkd": Variant("AFT + RGKD (λ 10)", {"replay_threshold": "none"}, THREE),
    "ema": Variant("+ averaged weights", {"ema_decay": 0.99}),
    "ema-late": Variant("+ averaged from epoch 2", {"ema_decay": 0.99, "ema_start_epoch": 2}),
    "ema-hold": Variant("+ averaged, learning rate held at 0.3", {"ema_decay": 0.99, "lr_hold": 0.3}),
    "awp": Variant("+ AWP (0.005)", {"awp_gamma": 0.005}),
    "eps-spread": Variant("+ sample-wise eps (spread 0.5)", {"eps_spread": 0.5}),
    "eps-10": Variant("+ eps 10/255 in training", {"eps_train": "10/255"}, THREE),
    "eps-6": Variant("+ eps 6/255 in training", {"eps_train": "6/255"}),
    "frozen-head": Variant("+ frozen head", {"freeze_head": True}),
    "smoothing": Variant("+ label smoothing 0.1", {"label_smoothing": 0.1}),
    "augment": Variant("+ TrivialAugment", {"augment": "trivialaugment"}),
    "erasing": Variant("+ random erasing 0.5", {"random_erasing": 0.5}),
    "best-eps-10": Variant("+ eps 10/255 in training", BEST | {"eps_train": "10/255"}, THREE, "recipe"),
    "best-ema-hold": Variant(
        "+ averaged, learning rate held at 0.3", BEST | {"ema_decay": 0.99, "lr_hold": 0.3}, THREE, "recipe"
    ),
    "best-no-replay": Variant("without replay", BEST | {"replay_threshold": "none"}, THREE, "recipe"),
    "best-tau-0.20": Variant("τ 0.20", BEST | {"replay_threshold": 0.2}, THREE, "recipe"),
    "best-tau-0.15": Variant("τ 0.15", BEST | {"replay_threshold": 0.15}, group="recipe"),
    "best-tau-0.20-eps-10": Variant(
        "τ 0.20, eps 10/255 in training", BEST | {"replay_threshold": 0.2, "eps_train": "10/255"}, THREE, "recipe"
    ),
    "clean-input": Variant("RGKD with the student at the clean input", {"rgkd_input": "clean"}, group="choices"),
    "replay-batch": Variant("the whole batch replayed by its mean", {"replay_by": "batch"}, THREE, "choices"),
    "replay-clean": Variant("the clean image replayed", {"replay_with": "clean"}, THREE, "choices"),
    "lambda-3": Variant("λ 3", {"rgkd_weight": 3}, group="lambda"),
    "lambda-30": Variant("λ 30", {"rgkd_weight": 30}, THREE, "lambda"),
    "lambda-300": Variant("λ 300", {"rgkd_weight": 300}, THREE, "lambda"),
    "tau-0.15": Variant("τ 0.15", {"replay_threshold": 0.15}, group="tau"),
    "tau-0.20": Variant("τ 0.20", {"replay_threshold": 0.2}, group="tau"),
    "tau-0.30": Variant("τ 0.30", {"replay_threshold": 0.3}, group="tau"),
    "best-lr-0.04": Variant("ARREST, the recipe (λ 100), lr 0.04", BEST | {"lr": 0.04}, THREE, "lr"),
    "best-lr-0.04-eps-10": Variant(
        "lr 0.04, eps 10/255 in training", BEST | {"lr": 0.04, "eps_train": "10/255"}, THREE, "recipe"
    ),
    "best-lr-0.08": Variant("ARREST, the recipe (λ 100), lr 0.08", BEST | {"lr": 0.08}, group="lr"),
    "aft-lr-0.04": Variant("AFT, lr 0.04", {"method": "at", "lr": 0.04}, THREE, "lr"),
    "aft-lr-0.08": Variant("AFT, lr 0.08", {"method": "at", "lr": 0.08}, THREE, "lr"),
    "aft-lr-0.16": Variant("AFT, lr 0.16", {"method": "at", "lr": 0.16}, group="lr"),
    "at-lr-0.1": Variant("AT, from nothing, lr 0.1", {"method": "at", "init": "random", "lr": 0.1}, group="lr"),
    "trades-lr-0.04": Variant("TRADES, finetuned, lr 0.04", {"method": "trades", "lr": 0.04}, group="lr"),
    "best-lr-0.04-fp32": Variant("ARREST, the recipe (λ 100), lr 0.04, fp32", FP32, THREE, "precision"),
    "aft-lr-0.04-fp32": Variant(
        "AFT, lr 0.04, fp32", {"method": "at", "lr": 0.04, "mixed_precision": "no"}, THREE, "precision"
    ),
    "trades-lr-0.04-fp32": Variant(
        "TRADES, finetuned, lr 0.04, fp32",
        {"method": "trades", "lr": 0.04, "mixed_precision": "no"},
        group="precision",
    ),
    "best-lr-0.04-no-replay-fp32": Variant("AFT + RGKD (λ 100)", FP32 | {"replay_threshold": "none"}, (1,), "parts"),
    "best-lr-0.04-ema-hold-fp32": Variant(
        "+ averaged (0.995), learning rate held at 0.3", FP32 | {"ema_decay": 0.995, "lr_hold": 0.3}, (1, 2), "parts"
    ),
    "best-lr-0.04-awp-fp32": Variant("+ AWP (0.005)", FP32 | {"awp_gamma": 0.005}, (1,), "parts"),
    "best-lr-0.04-eps-spread-fp32": Variant(
        "+ sample-wise eps (spread 0.5)", FP32 | {"eps_spread": 0.5}, (1,), "parts"
    ),
    "best-lr-0.04-eps-10-fp32": Variant("+ eps 10/255 in training", FP32 | {"eps_train": "10/255"}, (1,), "parts"),
    "best-lr-0.04-frozen-head-fp32": Variant("+ frozen head", FP32 | {"freeze_head": True}, (1,), "parts"),
    "best-lr-0.04-smoothing-fp32": Variant("+ label smoothing 0.1", FP32 | {"label_smoothing": 0.1}, (1,), "parts"),
    "best-lr-0.04-augment-fp32": Variant("+ TrivialAugment", FP32 | {"augment": "trivialaugment"}, (1,), "parts"),
}  # fmt: skip

PAPERS = {
    "resnet18": {
        "ARREST": (86.63, 46.14), "AR-AT": (87.82, 49.02), "AR-AT, averaged": (86.44, 50.28), "CURE": (86.76, 49.69),
        "LBGAT": (85.00, 48.85), "ADR, averaged, AWP": (83.26, 51.18), "DAJAT": (85.71, 52.48),
    },
    "wrn34_10": {"ARREST": (90.24, 50.20), "AR-AT, averaged": (90.06, 54.03), "DAJAT": (88.71, 57.81)},
}  # fmt: skip
"""Clean accuracy and accuracy under AutoAttack that are published for CIFAR-10, linf 8/255, without more data."""
