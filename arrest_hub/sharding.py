"""FSDP2, for networks that do not fit beside their gradients and optimizer state: every process keeps a part of the
weights, and each pass gathers a block's when it needs them.

Every pass is then a collective: all processes make the same number of them, also of the attack's.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor

from arrest_hub.backbones import Backbone
from arrest_hub.errors import ConfigError

LAUNCH = "accelerate launch --config_file recipes/accelerate/fsdp2.yaml"


def wants_sharding() -> bool:
    """Whether the launcher asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether `prepare` shards a network."""
    return accelerator.distributed_type == DistributedType.FSDP


def set_up_sharding(accelerator: Accelerator) -> None:
    """Settle how networks are sharded, if they are.

    Raises:
        ConfigError: the launcher asks for something else than FSDP2.
    """
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ConfigError(
            f"the launcher asks for {kind.value}; the attack's gradients with respect to the pixels are tested with "
            f"FSDP 2 alone. For a network that does not fit: {LAUNCH}; for one that does: --multi_gpu."
        )
    if not wants_sharding() or accelerator.num_processes == 1:
        return
    if not is_sharded(accelerator) or getattr(accelerator.state, "fsdp_plugin", None) is None:
        # Accelerate shards on accelerators alone; on the CPU, where it is of use to try it out, the same code works
        state = {"distributed_type": DistributedType.FSDP}
        PartialState._shared_state.update(state)
        AcceleratorState._shared_state.update(state | {"fsdp_plugin": FullyShardedDataParallelPlugin()})
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ConfigError(
            f"the launcher asks for FSDP {plugin.fsdp_version}; the attack's gradients with respect to the pixels are "
            f"tested with FSDP 2 alone. Give --fsdp_version 2, or {LAUNCH}."
        )
    # autocast does as it does without sharding; the policy would round the pixels before they are normalised
    plugin.mixed_precision_policy = None
    # a block's output may be a view, which nothing here changes in place
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")


def block_names(network: nn.Module) -> set[str]:
    """Class names of the blocks that a network repeats (``Block``, ``Bottleneck``): the innermost modules with
    parameters that stand in a list or a sequence with others of their class."""

    def repeated(module: nn.Module) -> list[nn.Module]:
        found = []
        for container in module.modules():
            if isinstance(container, (nn.ModuleList, nn.Sequential)):
                children = [child for child in container if any(True for _ in child.parameters())]
                classes = [type(child) for child in children]
                found += [child for child in children if classes.count(type(child)) > 1 and list(child.children())]
        return found

    return {type(block).__name__ for block in repeated(network) if not repeated(block)}


def choose_blocks(accelerator: Accelerator, network: nn.Module) -> None:
    """Have the network sharded block by block, unless the launcher has said how."""
    plugin = accelerator.state.fsdp_plugin
    if plugin.auto_wrap_policy is None:
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
        plugin.transformer_cls_names_to_wrap = sorted(block_names(network))


class WholeCopy:
    """An unsharded twin of a sharded network, on the CPU of the main process, through which it is written."""

    def __init__(self, accelerator: Accelerator, network: Backbone) -> None:
        self.twin = copy.deepcopy(network).cpu() if accelerator.is_main_process else None

    def take(self, network: nn.Module) -> Backbone | None:
        """The twin with the weights that ``network`` has now; None in other processes. Every process must call it."""
        state = full_state(network)
        if self.twin is not None:
            self.twin.load_state_dict(state)
        return self.twin


def full_state(network: nn.Module) -> Mapping[str, Any]:
    """The whole state dict of a sharded network on the CPU, in the main process; empty in others."""
    return get_model_state_dict(network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process has; of one that is not sharded, the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor. Every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
