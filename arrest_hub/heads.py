"""Where a timm or transformers network keeps its classification head, and how it is taken out or renewed."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from arrest_hub.errors import BackboneError
from arrest_hub.model_source import ModelSource

# transformers' names of classification heads; of the two heads of a distilled model the logits are averaged
_TRANSFORMERS_HEADS = (
    ("cls_classifier", "distillation_classifier"),
    ("classifier", "classifier_distill"),
    ("head", "dist_head"),
    ("classifier",),
    ("fc",),
)


class Slot(nn.Module):
    """Stands where one of several averaged heads was, and writes its input into its own part of the output.

    Scaled by the number of heads, so that the average the network takes is the inputs side by side. ``widths``: what
    `head_widths` says of the heads.
    """

    def __init__(self, index: int, count: int, widths: Sequence[int] | None = None) -> None:
        super().__init__()
        self.index, self.count, self.widths = index, count, widths

    def forward(self, x: Tensor) -> Tensor:
        widths = [x.shape[1]] * self.count if self.widths is None else self.widths
        parts = [x.new_zeros(len(x), width, *x.shape[2:]) for width in widths]
        parts[self.index] = x * self.count
        return torch.cat(parts, dim=1)


def head_widths(classifiers: Sequence[nn.Module]) -> list[int] | None:
    """How many features each head takes (CrossViT's branches differ); None where they do not say, and take as many."""
    widths = [width for head in classifiers if isinstance(width := getattr(head, "in_features", None), int)]
    return widths if len(widths) == len(classifiers) else None


class ClassificationHead(nn.Module):
    """Representation [B, num_features] -> logits [B, num_classes]; several heads' logits are averaged.

    ``dropout`` is what the network drops of the representation while it is trained.
    """

    def __init__(self, classifiers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.dropout: nn.Module = nn.Identity()
        self.classifiers = nn.ModuleList(classifiers)
        self.widths = head_widths(classifiers) if len(classifiers) > 1 else None

    def forward(self, representation: Tensor) -> Tensor:
        count = len(self.classifiers)
        representation = self.dropout(representation)
        parts = representation.chunk(count, dim=1) if self.widths is None else representation.split(self.widths, dim=1)
        logits = []
        for classifier, part in zip(self.classifiers, parts, strict=True):
            # some networks classify by a 1x1 convolution
            part = part[:, :, None, None] if isinstance(classifier, nn.Conv2d) else part
            logits.append(classifier(part).flatten(1))
        return logits[0] if len(logits) == 1 else torch.stack(logits).mean(dim=0)


def head_names(native: Any, source: ModelSource) -> tuple[str, ...]:
    """The names, inside ``native``, of the module or modules that turn the representation into logits."""
    if source.library == "timm":
        names = native.pretrained_cfg.get("classifier")
        if names is None:
            classifiers = native.get_classifier()
            classifiers = classifiers if isinstance(classifiers, (tuple, list)) else (classifiers,)
            names = tuple(name for name, module in native.named_modules() if any(module is c for c in classifiers))
        names = (names,) if isinstance(names, str) else tuple(names)
        # a variant with one head (LeViT without distillation) is configured with both
        names = tuple(name for name in names if _has_weights(native, name)) or names
    else:
        names = next((n for n in _TRANSFORMERS_HEADS if all(_has_weights(native, name) for name in n)), ())
    if not names or not all(_has_weights(native, name) for name in names):
        raise BackboneError(
            f"The classification head of {source.architecture} (model {source.model_id!r}) was not found, so it "
            "cannot be separated from its network, which this method needs. Use another architecture, such as "
            "'timm/resnet50.a1_in1k' or 'timm/vit_small_patch16_224'."
        )
    return names


def _has_weights(native: nn.Module, name: str) -> bool:
    """Whether there is a module of that name, with parameters."""
    module = dict(native.named_modules()).get(name)
    return module is not None and next(module.parameters(), None) is not None


def reset_timm_head(network: Any, names_of_heads: Sequence[str], count: int) -> None:
    """Fresh heads for ``count`` classes, initialised as the architecture does; no other weight changes."""
    # some architectures make what is before the classifier anew (CAFormer a hidden layer, LeViT a BatchNorm)
    heads = tuple(f"{name}." for name in names_of_heads)
    rest = {key: value for key, value in network.state_dict().items() if not key.startswith(heads)}
    # of two heads (RepViT) timm keeps the second only if told to
    keep_both = "distillation" in inspect.signature(network.reset_classifier).parameters
    network.reset_classifier(count, **({"distillation": len(names_of_heads) > 1} if keep_both else {}))
    network.load_state_dict(rest, strict=False)


def reset_transformers_head(
    network: Any, names_of_heads: Sequence[str], count: int, names: Sequence[str] | None
) -> None:
    """Fresh linear heads for ``count`` classes, initialised as the architecture does, and their label names."""
    network.config.num_labels = count
    network.num_labels = count
    labels = [f"LABEL_{i}" for i in range(count)] if names is None else names
    network.config.id2label = dict(enumerate(labels))
    network.config.label2id = {label: i for i, label in enumerate(labels)}
    for head_name in names_of_heads:
        head = network.get_submodule(head_name)
        # a head may wrap its linear layer (ResNet: flatten first)
        inner = [name for name, module in head.named_modules() if isinstance(module, nn.Linear)][-1]
        name = f"{head_name}.{inner}" if inner else head_name
        old = network.get_submodule(name)
        new = nn.Linear(old.in_features, count, old.bias is not None, device=old.weight.device, dtype=old.weight.dtype)
        with torch.no_grad():
            network._init_weights(new)
        network.set_submodule(name, new)
