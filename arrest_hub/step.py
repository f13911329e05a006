"""One training step: the network it attacks, the optimizer it takes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from arrest_hub.backbones import Backbone
from arrest_hub.config import FinetuneConfig
from arrest_hub.data import to_pixels
from arrest_hub.folding import FoldedNetwork, foldable
from arrest_hub.network_options import images_for_the_cache
from arrest_hub.objective import Objective, Prepared
from arrest_hub.sharding import is_sharded, whole
from arrest_hub.validation import PgdSettings
from arrest_hub.weight_perturbation import WeightPerturbation, unchanged

AUTOCAST = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# keeps the gradients that an fp16 attack passes through the network away from underflow
GRADIENT_SCALE = 128.0


def gradient_scale(config: FinetuneConfig) -> float:
    """The factor on what an attack maximises, in the configured precision."""
    return GRADIENT_SCALE if config.mixed_precision == "fp16" else 1.0


def validation_attack(config: FinetuneConfig, images_at_once: int | None) -> PgdSettings:
    """The attack of a validation: the training's, at the eps that the figures are of. ``images_at_once``: what
    `choose_images_at_once` chose."""
    eps = config.eps_value
    return PgdSettings(
        config.norm, eps, config.step_size_for(eps), config.attack_steps, images_at_once, gradient_scale(config)
    )


def make_optimizer(config: FinetuneConfig, student: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The configured optimizer, timm's, over ``student``; weight decay spares biases and normalisation."""
    return create_optimizer_v2(
        student, opt=config.optimizer, lr=lr, weight_decay=config.weight_decay, momentum=config.momentum
    )


def choose_images_at_once(config: FinetuneConfig, network: Backbone, device: torch.device) -> int | None:
    """How many images are attacked at a time: as configured, else on a CPU see `images_for_the_cache`; None: all."""
    if config.images_at_once is None and device.type == "cpu":
        return images_for_the_cache(network, config.mixed_precision)
    return config.images_at_once


def find_pairs(config: FinetuneConfig, network: Backbone) -> dict[str, str]:
    """What can be folded in a network, and is to be; looked for once in a network and its copies."""
    if not config.fold_batchnorm:
        return {}
    if network.foldable_pairs is None:
        generator = torch.Generator().manual_seed(0)
        network.foldable_pairs = foldable(network, torch.rand(2, 3, *network.preprocessing.size, generator=generator))
    return network.foldable_pairs


def for_eval_passes(config: FinetuneConfig, network: Backbone) -> nn.Module:
    """What is attacked, and compared with the teacher, in place of ``network``: the same to rounding in eval mode.

    A `FoldedNetwork` to be refreshed when the weights have changed, or the network itself where nothing can be folded.
    """
    if not find_pairs(config, network):
        return network
    folded = FoldedNetwork(network, find_pairs(config, network), AUTOCAST[config.mixed_precision])
    if config.compile:
        folded.compile()
    return folded


def attacked_network(
    config: FinetuneConfig, accelerator: Accelerator, student: Backbone, objective: Objective
) -> nn.Module:
    """What training attacks in place of the student: see `for_eval_passes`; a network that is sharded, itself."""
    if is_sharded(accelerator) or "attack" not in objective.passes:
        return student
    return for_eval_passes(config, student)


def make_teacher(config: FinetuneConfig, network: Backbone, device: torch.device) -> nn.Module | None:
    """A frozen copy of ``network`` on the device; None where the method needs no teacher."""
    if not config.needs_teacher:
        return None
    find_pairs(config, network)  # of the student, which is a copy or the network itself, too
    teacher = copy.deepcopy(network).eval().requires_grad_(False).to(device)
    if config.compile:
        teacher.compile()
    return for_eval_passes(config, teacher)


def refresh(network: nn.Module) -> None:
    """Have what `for_eval_passes` made follow the weights."""
    if isinstance(network, FoldedNetwork):
        network.refresh()


def train_step(
    accelerator: Accelerator,
    model: nn.Module,
    attacked: nn.Module,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, torch.Tensor],
    generator: torch.Generator,
    clip_grad: float | None,
    perturbation: WeightPerturbation | None = None,
    recomputed: Sequence[torch.Tensor] = (),
) -> dict[str, torch.Tensor]:
    """One batch: attack, training pass, backward pass, and (with the last batch of a step) the update of the weights.

    ``attacked``: the student, or what `for_eval_passes` made of it. ``batch``: "pixels" (uint8 [B, 3, H, W]) and
    "label" ([B]), on the device. ``perturbation``: of the student, for the training pass and its backward pass.
    ``recomputed``: see `recomputed_statistics`. Returns the objective's parts.
    """
    refresh(attacked)
    with accelerator.accumulate(model):
        with accelerator.autocast():
            prepared = objective.prepare(attacked, to_pixels(batch["pixels"]), batch["label"], generator)
        with worst_case(accelerator, objective, prepared, perturbation):
            with accelerator.autocast():
                parts = objective.loss(model, prepared)
            with unchanged(recomputed):
                accelerator.backward(parts["loss"])
        if accelerator.sync_gradients and clip_grad is not None:
            parts["grad_norm"] = whole(accelerator.clip_grad_norm_(model.parameters(), clip_grad))
        optimizer.step()
        optimizer.zero_grad()
    return parts


def make_perturbation(
    config: FinetuneConfig, accelerator: Accelerator | None, student: nn.Module
) -> WeightPerturbation | None:
    """The adversarial weight perturbation that --awp-gamma asks for; all processes perturb alike, or, without an
    accelerator, each by itself."""
    if not config.awp_gamma:
        return None
    options: dict[str, Any] = {} if accelerator is None else {"average": partial(accelerator.reduce, reduction="mean")}
    return WeightPerturbation(student, config.awp_gamma, gradient_scale=gradient_scale(config), **options)


@contextmanager
def worst_case(
    accelerator: Accelerator, objective: Objective, prepared: Prepared, perturbation: WeightPerturbation | None
) -> Iterator[None]:
    """Within this context the student's weights are the worst nearby for this batch; None: they stay."""
    if perturbation is None:
        yield
        return

    def loss() -> torch.Tensor:
        with accelerator.autocast():
            return objective.loss(perturbation.student, prepared)["loss"]

    with perturbation.worst_case(loss):
        yield


def recomputed_statistics(config: FinetuneConfig, network: nn.Module) -> list[torch.Tensor]:
    """The buffers of BatchNorm that a backward pass would update once more, since --grad-checkpointing has it compute
    the training pass again."""
    if not config.grad_checkpointing:
        return []
    return [buffer for module in network.modules() if isinstance(module, _BatchNorm) for buffer in module.buffers()]


def average_statistics(accelerator: Accelerator, network: nn.Module) -> None:
    """Make BatchNorm's running statistics the mean over the processes, so that all attack the same network and a
    checkpoint holds what every process goes on with. One collective, none for a network without them.

    DistributedDataParallel would overwrite them by the first process's, and not before its next forward pass.
    """
    if accelerator.num_processes == 1:
        return
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    statistics = [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var) if buffer is not None]
    if not statistics:
        return
    mean = accelerator.reduce(torch.cat([buffer.float() for buffer in statistics]), "mean")
    for buffer, part in zip(statistics, mean.split([buffer.numel() for buffer in statistics]), strict=True):
        buffer.copy_(part)
