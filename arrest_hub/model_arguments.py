"""Keyword arguments of a timm architecture: which of timm.create_model's are none."""

from __future__ import annotations

from collections.abc import Iterable

NOT_THE_ARCHITECTURES = {
    "checkpoint_path", "features_only", "out_indices", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay",
    "cache_dir", "scriptable", "exportable",
}  # fmt: skip
"""They say where weights come from, or what is made of the network."""

DROPPED = {"drop_rate", "drop_path_rate", "attn_drop_rate", "patch_drop_rate", "pos_drop_rate", "proj_drop_rate"}
"""What is dropped in training alone: it may be chosen for a timm network that brings its weights, too."""


def model_args_problem(names: Iterable[str]) -> str | None:
    """A sentence on those that may not be given; None if all may."""
    refused = sorted(NOT_THE_ARCHITECTURES & set(names))
    if not refused:
        return None
    return (
        f"{', '.join(refused)}: that says where weights come from, or what is made of the network, and not what it is. "
        "Leave it out; a folder or an id as the model brings weights."
    )
