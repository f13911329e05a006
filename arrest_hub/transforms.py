"""How a model wants its images: resize, crop and interpolation, as torchvision v2 transforms.

Images leave as uint8 tensors; the division by 255 that gives pixels in [0, 1] happens on the device,
and the mean and standard deviation belong to the model (`backbones.Backbone`), not to the data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from arrest_hub.errors import BackboneError, did_you_mean
from arrest_hub.images import ImageError
from arrest_hub.seeding import seeded

CROP_MODES = ("center", "squash", "border")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")

AUGMENTATIONS: dict[str, Callable[[], Callable]] = {
    "trivialaugment": v2.TrivialAugmentWide,
    "randaugment": v2.RandAugment,
    "autoaugment": lambda: v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
}
"""By name: TrivialAugment (Müller and Hutter 2021, arXiv 2103.10158), RandAugment (Cubuk et al. 2019, arXiv 1909.13719;
2 operations of magnitude 9), AutoAugment's policy for CIFAR-10 (Cubuk et al. 2018, arXiv 1805.09501)."""

SMALL = 64
"""Up to this many pixels a side, training pads and crops (as is usual for CIFAR) instead of zooming."""

Transform = Callable[[Image.Image], Tensor]
"""RGB image of any size -> uint8 tensor [3, H, W]."""


def transformed(transform: Transform, image: Image.Image, seed: int, epoch: int, index: int, split: str) -> Tensor:
    """``transform(image)``, whose draws depend on seed, epoch and index alone: uint8 [3, H, W].

    Raises ImageError naming the image where that cannot be made of it, such as of one of 4,000 pixels by one.
    """
    with seeded(seed, epoch, index):
        try:
            return transform(image)
        except (ValueError, MemoryError) as error:
            size = f"{image.width} x {image.height} pixels"
            raise ImageError(
                f"split {split!r}, image {index}: of {size} no input of the network can be made ({error}). Remove it, "
                "or cut it to another shape."
            ) from error


@dataclass(frozen=True)
class Preprocessing:
    """What a model expects of an image, in timm's terms.

    ``size`` is (height, width) in pixels. ``crop_pct`` is the share of the resized image that the centre
    crop keeps. ``crop_mode`` is "center" (resize the shorter side, crop the centre), "squash" (resize both
    sides, ignoring the aspect ratio) or "border" (resize the longer side, pad). ``floor_crop``: where the centre lies
    between two pixels the crop begins at the first, as in transformers; else at the even one, as in torchvision and
    timm. ``mean`` and ``std`` apply to pixels in [0, 1], one value a channel.

    Raises BackboneError for a value no transform can be made of.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_pct: float = 1.0
    crop_mode: str = "center"
    interpolation: str = "bilinear"
    floor_crop: bool = False

    def __post_init__(self) -> None:
        if len(self.size) != 2 or min(self.size) < 1:
            raise BackboneError(f"image size {self.size!r} is not (height, width) in pixels, both at least 1.")
        if not self.crop_pct > 0:
            raise BackboneError(f"crop_pct {self.crop_pct!r} is not above 0; use the share kept, such as 0.875.")
        if self.crop_mode not in CROP_MODES:
            raise BackboneError(
                f"crop_mode {self.crop_mode!r} is unknown; use one of {', '.join(CROP_MODES)}."
                + did_you_mean(self.crop_mode, CROP_MODES)
            )
        if self.interpolation not in INTERPOLATIONS:
            raise BackboneError(
                f"interpolation {self.interpolation!r} is unknown; use one of {', '.join(INTERPOLATIONS)}."
                + did_you_mean(self.interpolation, INTERPOLATIONS)
            )


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> uint8 tensor [3, H, W]; the tensor owns its memory."""
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def eval_transform(preprocessing: Preprocessing) -> Transform:
    """The evaluation transform of timm, pixel for pixel: RGB image -> uint8 [3, H, W].

    It equals ``timm.data.create_transform(..., is_training=False, normalize=False)`` on PIL images.
    """
    return v2.Compose([*_fit(preprocessing), to_tensor])


def train_transform(
    preprocessing: Preprocessing,
    hflip: float = 0.5,
    crop_min_scale: float = 0.25,
    augment: str = "none",
    random_erasing: float = 0.0,
) -> Transform:
    """A random training transform: RGB image -> uint8 [3, H, W].

    Up to 64 pixels a side: the image is brought to the model's size (untouched if it has it), padded with
    black by an eighth of the size and cropped at random. Above: a random crop of between
    ``crop_min_scale`` and all of the area, aspect ratio 3/4 to 4/3, resized. Then a horizontal flip with
    probability ``hflip``, one of `AUGMENTATIONS` unless ``augment`` is "none", and with probability ``random_erasing``
    a rectangle of 2 to 33 % of the area is blackened (Zhong et al. 2017, arXiv 1708.04896). All randomness comes from
    torch's default generator.

    Raises ValueError when ``hflip`` or ``random_erasing`` is outside [0, 1], ``crop_min_scale`` outside (0, 1] or
    ``augment`` unknown.
    """
    for name, value in (("hflip", hflip), ("random_erasing", random_erasing)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be a probability in [0, 1], not {value!r}")
    if augment != "none" and augment not in AUGMENTATIONS:
        raise ValueError(f"augment {augment!r} is not one of none, {', '.join(AUGMENTATIONS)}")
    stronger = [] if augment == "none" else [AUGMENTATIONS[augment]()]
    erase = [v2.RandomErasing(random_erasing)] if random_erasing else []
    if not 0 < crop_min_scale <= 1:
        raise ValueError(f"crop_min_scale must be a share of the area in (0, 1], not {crop_min_scale!r}")
    if max(preprocessing.size) <= SMALL:
        small = SmallTrainTransform(preprocessing, hflip)
        return v2.Compose([small, *stronger, to_tensor, *erase])
    steps: list[Callable] = [
        v2.RandomResizedCrop(
            list(preprocessing.size),
            scale=(crop_min_scale, 1.0),
            interpolation=InterpolationMode(preprocessing.interpolation),
        )
    ]
    if hflip > 0:
        steps.append(v2.RandomHorizontalFlip(hflip))
    return v2.Compose([*steps, *stronger, to_tensor, *erase])


class SmallTrainTransform:
    """Random crop with zero padding of an eighth of the size, and a flip, in one PIL crop: image -> image.

    The same images as v2.RandomCrop(size, padding) and v2.RandomHorizontalFlip, four times as fast on
    32 x 32 images, where the cost of a transform is its overhead.
    """

    def __init__(self, preprocessing: Preprocessing, hflip: float) -> None:
        self.height, self.width = preprocessing.size
        self.hflip = hflip
        self.fit = v2.Compose(_fit(replace(preprocessing, crop_pct=1.0)))

    def __call__(self, image: Image.Image) -> Image.Image:
        if image.size != (self.width, self.height):
            image = self.fit(image)
        draw_top, draw_left, draw_flip = torch.rand(3, generator=torch.default_generator).tolist()
        pad_h, pad_w = self.height // 8, self.width // 8
        top = int(draw_top * (2 * pad_h + 1)) - pad_h
        left = int(draw_left * (2 * pad_w + 1)) - pad_w
        # PIL fills what lies outside the image with zeros
        image = image.crop((left, top, left + self.width, top + self.height))
        if draw_flip < self.hflip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image


def _fit(p: Preprocessing) -> list[Callable]:
    """timm's resize and crop, without its conversion to a tensor, which is not contiguous."""
    steps = create_transform(
        p.size, normalize=False, mean=p.mean, crop_pct=p.crop_pct, crop_mode=p.crop_mode, interpolation=p.interpolation
    ).transforms[:-1]
    return [*steps[:-1], _FloorCrop(list(p.size))] if p.floor_crop and p.crop_mode != "border" else steps


class _FloorCrop:
    """Crop the centre (height, width), the smaller half of an odd rest being left and above."""

    def __init__(self, size: list[int]) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        return F.crop(image, int((image.height - height) / 2), int((image.width - width) / 2), height, width)
