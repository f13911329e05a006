"""Backbone -> a folder that plain timm or transformers loads, without this package.

The CIFAR architectures are the exception: timm knows them after ``import arrest_hub.architectures``.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from arrest_hub.backbones import Backbone
from arrest_hub.checkpoint import flush_to_disk
from arrest_hub.files import as_os_error
from arrest_hub.image_processor import quiet_transformers

MAX_SHARD_SIZE = "5GB"
"""Of transformers' weights; larger ones are split into several files with an index. timm reads one file only."""


def write_model_folder(backbone: Backbone, folder: str | os.PathLike[str]) -> None:
    """Write model.safetensors and config.json (for transformers also preprocessor_config.json) to ``folder``.

    The weights are float32. They are written to a sibling folder which is then renamed, so ``folder`` is
    never half written, also where the power fails; an existing ``folder`` is replaced with all it holds.
    The same weights give the same bytes. Raises OSError when the folder cannot be written.
    """
    folder = Path(folder).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as staging:
        new = Path(staging) / "new"
        new.mkdir()
        try:
            with backbone.native() as network:
                if backbone.source.library == "timm":
                    _write_timm(network, backbone, new)
                else:
                    _write_transformers(network, backbone, new)
        except SafetensorError as error:
            raise as_os_error(error, folder) from error
        mode = (new / "config.json").stat().st_mode
        for weights in new.glob("*.safetensors"):  # which safetensors writes for its user alone
            with contextlib.suppress(OSError):  # of a file system without modes
                weights.chmod(stat.S_IMODE(mode))
        flush_to_disk(new)
        old = Path(staging) / "old"
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise


def _portable_state(network: nn.Module) -> dict[str, Tensor]:
    """The state dict on the CPU, floats as float32, each tensor with memory of its own."""
    state = {}
    for name, tensor in network.state_dict().items():
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        state[name] = tensor.detach().to("cpu", dtype, copy=True).contiguous()
    return state


def _write_timm(network: Any, backbone: Backbone, folder: Path) -> None:
    wants = backbone.preprocessing
    # timm records the arguments that rebuild the architecture (model_args) by itself
    save_config_for_hf(
        network,
        str(folder / "config.json"),
        model_config={"label_names": backbone.label_names} if backbone.label_names else None,
        data_config={
            "input_size": (3, *wants.size),
            "mean": wants.mean,
            "std": wants.std,
            "crop_pct": wants.crop_pct,
            "crop_mode": wants.crop_mode,
            "interpolation": wants.interpolation,
        },
    )
    save_file(_portable_state(network), folder / "model.safetensors", metadata={"format": "pt"})


def _write_transformers(network: Any, backbone: Backbone, folder: Path) -> None:
    names = backbone.label_names
    if names is not None:  # they may be the dataset's, where the model had none
        network.config.id2label = dict(enumerate(names))
        network.config.label2id = {name: index for index, name in enumerate(names)}
    network.config.problem_type = None  # of the network before: the logits are of one class among several
    with quiet_transformers():
        network.save_pretrained(folder, state_dict=_portable_state(network), max_shard_size=MAX_SHARD_SIZE)
    backbone.processor.save_pretrained(folder)


def weights_digest(module: nn.Module) -> str:
    """SHA-256 of a network's parameters and buffers, names and values: which weights a figure belongs to."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if not isinstance(value, Tensor):  # what a module says of itself beside its tensors
            digest.update(f"{name} {value!r}".encode())
            continue
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
