"""Tiny networks, datasets and runs that the tests share."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from torch import nn

from arrest_hub import loop
from arrest_hub.attacks import frozen_eval, pgd
from arrest_hub.backbones import Backbone, BackboneOutput, load_backbone
from arrest_hub.config import FinetuneConfig
from arrest_hub.export import write_model_folder

NAMES = ["dark", "middle", "light"]
CHANNELS = (16, 16, 16, 16)  # fewer are not computed with the channels innermost on a CPU (`miscomputed_on_cpus`)
LAYERS = (1, 1, 1, 1)


class TinyClassifier(nn.Module):
    """Pixels [B, 3, 8, 8] -> BackboneOutput; convolution, BatchNorm, dropout, a linear head; counts its passes."""

    def __init__(self, num_classes: int = 3, seed: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(3, 6, 3, padding=1)
            self.norm = nn.BatchNorm2d(6)
            self.dropout = nn.Dropout(dropout)
            self.head = nn.Linear(6 * 16, num_classes)
        self.passes: list[tuple[int, bool, bool, bool]] = []

    def forward(self, pixels: torch.Tensor) -> BackboneOutput:
        frozen = not any(parameter.requires_grad for parameter in self.parameters())
        self.passes.append((len(pixels), self.training, torch.is_grad_enabled(), frozen))
        x = torch.relu(self.norm(self.conv(pixels - 0.5)))
        representation = self.dropout(nn.functional.avg_pool2d(x, 2)).flatten(1)
        return BackboneOutput(self.head(representation), representation)


class LogitsOnly(nn.Module):
    """A backbone as other libraries want a classifier: pixels -> logits, through ``change``."""

    def __init__(self, backbone: nn.Module, change: Any = lambda logits: logits) -> None:
        super().__init__()
        self.backbone, self.change = backbone, change

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        output = self.backbone(pixels)
        return self.change(getattr(output, "logits", output))


def patterns(count: int, classes: int, seed: int = 0, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """(pixels [N, 3, 8, 8] on the grid of uint8, labels [N]): a pattern of its own for each class, under noise."""
    templates = torch.randn(classes, 3, size, size, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(count) % classes
    noise = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
    pixels = (0.5 + 0.12 * templates[labels] + 0.12 * noise).clamp(0, 1)
    return (pixels * 255).round() / 255, labels


@cache
def robust_state(classes: int) -> dict[str, torch.Tensor]:
    """A smooth little network trained adversarially on `patterns`, as a state dict."""
    net = smooth_net(classes)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    pixels, labels = patterns(160, classes, seed=1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        with frozen_eval(net):
            adversarial = pgd(
                net, pixels, labels, eps=16 / 255, step_size=8 / 255, steps=3, generator=generator
            ).adversarial
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(adversarial), labels).backward()
        optimizer.step()
    return net.state_dict()


def smooth_net(classes: int) -> nn.Sequential:
    """Pixels [B, 3, 8, 8] -> logits, without a kink anywhere; seeded."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 24), nn.Softplus(), nn.Linear(24, classes))


def robust_net(classes: int = 4) -> nn.Sequential:
    """The trained `smooth_net`, in eval mode."""
    net = smooth_net(classes)
    net.load_state_dict(robust_state(classes))
    return net.eval()


def write_images(
    folder: Path,
    count: int = 48,
    size: int = 8,
    splits: tuple[str, ...] = ("train", "test"),
    names: list[str] = NAMES,
) -> Path:
    """A Parquet dataset of noisy images whose brightness is their class: columns img, label."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, split in enumerate(splits):
        (folder / f"{split}-00000-of-00001.parquet").write_bytes(images_file(number, count, size, tuple(names)))
    return folder


@cache
def images_file(seed: int, count: int, size: int, names: tuple[str, ...]) -> bytes:
    """A split of `write_images`."""
    features = Features({"img": Image(), "label": ClassLabel(names=list(names))})
    rng = np.random.default_rng(seed)
    labels = [i % 3 for i in range(count)]
    images = [
        PILImage.fromarray(np.clip(rng.normal(60 + 70 * label, 25, (size, size, 3)), 0, 255).astype(np.uint8))
        for label in labels
    ]
    file = BytesIO()
    Dataset.from_dict({"img": images, "label": labels}, features=features).to_parquet(file)
    return file.getvalue()


@cache
def pretrained_state(classes: int, channels: tuple[int, ...] = CHANNELS) -> dict[str, torch.Tensor]:
    """A narrow `resnet18_cifar` after a few steps on images like those of `write_images`: right, and not robust."""
    backbone = tiny_backbone(classes, channels)
    optimizer = torch.optim.Adam(backbone.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(0)
    backbone.train()
    for _ in range(40):
        labels = torch.arange(48) % 3
        noise = torch.randn(48, 3, 8, 8, generator=generator) * 25
        pixels = ((60 + 70 * labels.view(-1, 1, 1, 1) + noise) / 255).clamp(0, 1)
        optimizer.zero_grad()
        nn.functional.cross_entropy(backbone(pixels).logits, labels).backward()
        optimizer.step()
    return backbone.state_dict()


def tiny_backbone(classes: int = 3, channels: tuple[int, ...] = CHANNELS) -> Backbone:
    """`resnet18_cifar` with a few channels, for 8x8 pixels, seeded."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return load_backbone(
            "resnet18_cifar", num_classes=classes, image_size=8, model_args={"layers": LAYERS, "channels": channels}
        )


def write_model(folder: Path, label_names: list[str] | None = None) -> Path:
    """A pretrained narrow `resnet18_cifar` as a timm model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in model_files(tuple(label_names or NAMES)).items():
        (folder / name).write_bytes(content)
    return folder


@cache
def model_files(names: tuple[str, ...]) -> dict[str, bytes]:
    """The files of `write_model`."""
    backbone = tiny_backbone(len(names))
    backbone.load_state_dict(pretrained_state(len(names)))
    backbone.label_names = list(names)
    with tempfile.TemporaryDirectory() as folder:
        write_model_folder(backbone, Path(folder) / "model")
        return {path.name: path.read_bytes() for path in (Path(folder) / "model").iterdir()}


def tiny_config(tmp_path: Path, **changes: Any) -> FinetuneConfig:
    """A run of a few steps on the tiny dataset and model, which are written if they are not there."""
    data, model = tmp_path / "data", tmp_path / "model"
    if not data.exists():
        write_images(data)
    if "model" not in changes and not model.exists():
        write_model(model)
    values: dict[str, Any] = {
        "model": str(model), "dataset": str(data), "output_dir": str(tmp_path / "run"), "epochs": 2, "batch_size": 8,
        "attack_steps": 2, "eval_attack_steps": 1, "num_workers": 0, "validation_size": 12, "log_every": 2, "lr": 0.05,
        "figures": False,
    }  # fmt: skip
    return FinetuneConfig(**(values | changes))


class Killed(BaseException):
    """What ends a run that is killed."""


@contextmanager
def killed_after(steps: int) -> Iterator[None]:
    """The run within dies in the training step after ``steps``."""
    plain, count = loop.train_step, 0

    def step(*arguments: Any) -> Any:
        nonlocal count
        if count == steps:
            raise Killed
        count += 1
        return plain(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", step)
        with pytest.raises(Killed):
            yield
