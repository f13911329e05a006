"""Evaluation equals timm's, pixel for pixel; training is random in the stated ways only."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from arrest_hub.errors import BackboneError
from arrest_hub.transforms import Preprocessing, eval_transform, train_transform

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def preprocessing(size, **options) -> Preprocessing:
    return Preprocessing(size, MEAN, STD, **options)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(32, 32), (96, 96), (64, 80)])
@pytest.mark.parametrize(("crop_pct", "interpolation"), [(1.0, "bicubic"), (0.875, "bilinear"), (0.95, "lanczos")])
def test_eval_equals_timm(crop_mode, size, crop_pct, interpolation):
    ours = eval_transform(preprocessing(size, crop_pct=crop_pct, crop_mode=crop_mode, interpolation=interpolation))
    theirs = create_transform(
        size, interpolation=interpolation, crop_pct=crop_pct, crop_mode=crop_mode, mean=MEAN, std=STD, normalize=False
    )
    for width, height in [(size[1], size[0]), (120, 75), (51, 133), (20, 20)]:
        pixels = ours(image(width, height))
        assert pixels.dtype == torch.uint8
        assert pixels.shape == (3, *size)
        assert torch.equal(pixels, theirs(image(width, height)))


def test_small_training_crops_are_shifts_with_black_borders():
    source = image(32, 32)
    padded = F.pad(F.pil_to_tensor(source), [4])
    crops = {padded[:, top : top + 32, left : left + 32].numpy().tobytes() for top in range(9) for left in range(9)}
    transform = train_transform(preprocessing((32, 32)), hflip=0)
    torch.manual_seed(0)
    seen = {transform(source).numpy().tobytes() for _ in range(600)}
    assert seen == crops  # every shift, none other; at 81 shifts 600 draws miss one with probability 5 %, seed fixed


def test_each_side_is_padded_by_an_eighth_of_its_own():
    source = image(64, 32)
    padded = F.pad(F.pil_to_tensor(source), [8, 4])
    crops = {padded[:, top : top + 32, left : left + 64].numpy().tobytes() for top in range(9) for left in range(17)}
    transform = train_transform(preprocessing((32, 64)), hflip=0)
    torch.manual_seed(0)
    assert {transform(source).numpy().tobytes() for _ in range(1500)} == crops


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
def test_small_training_images_of_another_size_are_fitted_whole(interpolation):
    """Whatever share of an image the evaluation keeps, training draws its crops from all of it."""
    options = {"interpolation": interpolation, "crop_pct": 0.5}
    fitted = eval_transform(preprocessing((32, 32), **(options | {"crop_pct": 1.0})))(image(70, 50))
    transform = train_transform(preprocessing((32, 32), **options), hflip=0)
    torch.manual_seed(0)
    crops = [transform(image(70, 50)) for _ in range(300)]
    assert any(torch.equal(crop, fitted) for crop in crops), "the shift by nothing"


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize("size", [(96, 96), (72, 96)])
def test_large_training_crops_are_torchvisions(size, interpolation):
    transform = train_transform(preprocessing(size, interpolation=interpolation), hflip=0.3, crop_min_scale=0.4)
    mode = InterpolationMode(interpolation)
    crop = v2.RandomResizedCrop(list(size), scale=(0.4, 1.0), ratio=(3 / 4, 4 / 3), interpolation=mode)
    wanted = v2.Compose([crop, v2.RandomHorizontalFlip(0.3)])
    for seed in range(10):
        torch.manual_seed(seed)
        found = transform(image(150, 120))
        torch.manual_seed(seed)
        assert torch.equal(found, F.pil_to_tensor(wanted(image(150, 120))))


def test_from_which_size_on_training_zooms():
    """64 pixels a side are still padded, and one more is not."""
    for side, padded in ((64, True), (65, False)):
        transform = train_transform(preprocessing((side, side)), hflip=0)
        white = Image.fromarray(np.full((side, side, 3), 255, np.uint8))
        torch.manual_seed(0)
        assert (min(int(transform(white).min()) for _ in range(20)) == 0) == padded


def test_flip_probability():
    torch.manual_seed(0)
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 32, dtype=np.uint8)[None, :, None], (32, 1, 3)))
    for hflip, low, high in ((0.0, 0, 0), (0.5, 30, 70), (1.0, 100, 100)):
        transform = train_transform(preprocessing((32, 32)), hflip=hflip)
        flips = sum(int((out := transform(ramp))[0, 16, 8] > out[0, 16, -8]) for _ in range(100))
        assert low <= flips <= high
    half = train_transform(preprocessing((96, 96)), hflip=0.5, crop_min_scale=1.0)
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 96, dtype=np.uint8)[None, :, None], (96, 1, 3)))
    flips = sum(int((out := half(ramp))[0, 50, 0] > out[0, 50, -1]) for _ in range(100))
    assert 30 < flips < 70


@pytest.mark.parametrize("size", [(32, 32), (96, 80)])
def test_training_draws_from_torch_alone(size):
    transform, source = train_transform(preprocessing(size)), image(70, 50)
    torch.manual_seed(3)
    first = transform(source)
    np.random.seed(0)
    torch.manual_seed(3)
    assert torch.equal(first, transform(source))
    assert not torch.equal(first, transform(source))
    assert first.dtype == torch.uint8
    assert first.shape == (3, *size)


def test_crop_min_scale_bounds_the_zoom():
    """With a scale of 1 a square image is never cropped to less than its aspect range allows."""
    ramp = np.tile(np.linspace(0, 255, 128, dtype=np.uint8)[None, :, None], (128, 1, 3))
    torch.manual_seed(0)
    spans = {}
    for scale in (1.0, 0.1):
        transform = train_transform(preprocessing((96, 96)), hflip=0, crop_min_scale=scale)
        outs = [transform(Image.fromarray(ramp))[0, 0].int() for _ in range(30)]
        spans[scale] = min(int(out.max() - out.min()) for out in outs)
    assert spans[1.0] > 180
    assert spans[0.1] < 150


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"crop_mode": "centre"}, "Did you mean 'center'"),
        ({"interpolation": "bicubical"}, "Did you mean 'bicubic'"),
        ({"crop_pct": 0.0}, "crop_pct"),
        ({"size": (0, 32)}, "image size"),
    ],
)
def test_impossible_preprocessing(change, words):
    with pytest.raises(BackboneError, match=words):
        Preprocessing(**{"size": (32, 32), "mean": MEAN, "std": STD, **change})


def test_impossible_augmentation():
    with pytest.raises(ValueError, match="hflip"):
        train_transform(preprocessing((32, 32)), hflip=1.5)
    with pytest.raises(ValueError, match="crop_min_scale"):
        train_transform(preprocessing((32, 32)), crop_min_scale=0)
    with pytest.raises(ValueError, match="random_erasing"):
        train_transform(preprocessing((32, 32)), random_erasing=-0.1)
    with pytest.raises(ValueError, match="cutmix"):
        train_transform(preprocessing((32, 32)), augment="cutmix")


@pytest.mark.parametrize("size", [(32, 32), (96, 96)])
@pytest.mark.parametrize("name", ["trivialaugment", "randaugment", "autoaugment"])
def test_stronger_augmentation_is_torchvisions_on_the_cropped_image(size, name):
    source, plain = image(*size), train_transform(preprocessing(size))
    stronger = train_transform(preprocessing(size), augment=name)
    policies = {"trivialaugment": v2.TrivialAugmentWide(), "randaugment": v2.RandAugment(),
                "autoaugment": v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)}  # fmt: skip
    changed = 0
    for seed in range(20):
        torch.manual_seed(seed)
        found = stronger(source)
        torch.manual_seed(seed)
        cropped = plain(source)  # draws the same crop and flip first
        wanted = policies[name](Image.fromarray(cropped.permute(1, 2, 0).numpy()))
        assert found.dtype == torch.uint8
        assert torch.equal(found, torch.from_numpy(np.asarray(wanted).transpose(2, 0, 1).copy()))
        changed += not torch.equal(found, cropped)
    assert changed > 10


@pytest.mark.parametrize("size", [(32, 32), (96, 96)])
def test_random_erasing_blackens_a_rectangle(size):
    source = Image.fromarray(np.full((*size, 3), 200, np.uint8))
    transform = train_transform(preprocessing(size), hflip=0, crop_min_scale=1.0, random_erasing=1.0)
    plain = train_transform(preprocessing(size), hflip=0, crop_min_scale=1.0)
    shares = []
    for seed in range(40):
        torch.manual_seed(seed)
        found = transform(source)
        torch.manual_seed(seed)
        black = ((found == 0) & (plain(source) != 0)).all(dim=0)
        rows, columns = black.any(dim=1).nonzero(), black.any(dim=0).nonzero()
        shares.append(black.sum().item() / black.numel())
        if len(rows):
            corner = plain(source)[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            inside = black[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert inside[(corner != 0).all(dim=0)].all(), "all of the rectangle"
    assert 0.02 < np.mean(shares) < 0.25
    assert max(shares) <= 0.34


@pytest.mark.parametrize("size", [(20, 30), (41, 27), (90, 33)])
def test_a_border_is_the_mean_wherever_the_centre_is_rounded_to(size):
    options = {"crop_mode": "border", "crop_pct": 0.9}
    plain, floored = (eval_transform(preprocessing((33, 33), floor_crop=floor, **options)) for floor in (False, True))
    assert torch.equal(plain(image(*size)), floored(image(*size)))
