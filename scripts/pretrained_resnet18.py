"""Write a standardly pretrained ResNet-18 for CIFAR-10 as a model folder: a network to finetune, without training one.

    python scripts/pretrained_resnet18.py                                     # writes ./resnet18_cifar10
    arrest-finetune --model ./resnet18_cifar10 --dataset cifar10

The weights are those of AutoAttack's example (pyautoattack, MIT, a dependency that is installed already): trained on
CIFAR-10's clean images alone, on pixels in [0, 1] without normalisation, and not robust at all.
"""

import argparse
import sys
from importlib.resources import files
from pathlib import Path

import timm
import torch

import arrest_hub.architectures  # noqa: F401  registers resnet18_cifar

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
RENAMED = {"shortcut.": "downsample.", "linear.": "fc."}
"""What the example's layers are called by timm."""


def renamed(name: str) -> str:
    """A parameter's name in timm's ResNet."""
    for theirs, ours in RENAMED.items():
        name = name.replace(theirs, ours)
    return name


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("resnet18_cifar10"))
    args = parser.parse_args(argv)
    if args.output_dir.exists():
        parser.error(f"--output-dir {args.output_dir} exists already: name another, or delete it")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    source = files("pyautoattack") / "examples" / "model_test.pt"
    if not source.is_file():
        sys.exit("this pyautoattack has no examples/model_test.pt: install pyautoattack 0.2.0")
    with source.open("rb") as file:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    model = timm.create_model("resnet18_cifar", num_classes=10)
    model.load_state_dict({renamed(name): value for name, value in weights.items()})
    timm.models.save_for_hf(
        model,
        args.output_dir,
        safe_serialization=True,
        model_config={"label_names": CLASSES},
        data_config={"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "input_size": (3, 32, 32), "crop_pct": 1.0},
    )
    print(args.output_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
