"""How many signs of the attack's gradient survive half precision, on a confident network.

    python scripts/benchmarks/gradient_signs.py --model resnet18-folder --dataset cifar10-folder

Compares the first step's gradient with respect to the pixels with that in fp32, by precision and by what is maximised:
the margin, as arrest_hub.attacks.pgd does, or plain cross-entropy; and with the first convolution in fp32, as
`--mixed-precision fp16` has it. Pixels whose fp32 gradient is exactly zero have no
sign to keep and are left out.
"""

from __future__ import annotations

import argparse
import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from arrest_hub.attacks import frozen_eval, margin
from arrest_hub.backbones import Backbone, load_backbone
from arrest_hub.data import eval_loader, load_splits, to_pixels
from arrest_hub.network_options import keep_first_convolution_in_fp32
from arrest_hub.step import GRADIENT_SCALE
from arrest_hub.transforms import eval_transform


def gradient(model: Backbone, pixels: Tensor, labels: Tensor, dtype: torch.dtype | None, loss: str) -> Tensor:
    """Of the loss with respect to the pixels, as the attack's first step takes it."""
    pixels = pixels.clone().requires_grad_(True)
    with torch.autocast(pixels.device.type, dtype=dtype, enabled=dtype is not None):
        logits = model(pixels).logits
        if loss.startswith("margin"):
            total = margin(logits, labels).sum() * (GRADIENT_SCALE if dtype == torch.float16 else 1.0)
        else:
            total = F.cross_entropy(logits.float(), labels, reduction="sum")
    return torch.autograd.grad(total, pixels)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--images", type=int, default=256)
    args = parser.parse_args()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model = load_backbone(args.model).to(device)
    stem = copy.deepcopy(model)
    keep_first_convolution_in_fp32(stem)
    split = load_splits(args.dataset, limit_eval=args.images).test
    loader = eval_loader(split, eval_transform(model.preprocessing), batch_size=64, num_workers=0)
    equal: dict[tuple[str, str], list[Tensor]] = {}
    dead: dict[tuple[str, str], list[Tensor]] = {}
    entropies = []
    with frozen_eval(model), frozen_eval(stem):
        for batch in loader:
            pixels, labels = to_pixels(batch["pixels"]).to(device), batch["label"].to(device)
            with torch.no_grad():
                entropies.append(F.cross_entropy(model(pixels).logits, labels, reduction="none"))
            true = gradient(model, pixels, labels, None, "margin")
            kept = true != 0
            for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", None)):
                for loss in ("margin", "margin, stem fp32", "cross-entropy")[:: 1 if dtype else 2]:
                    found = gradient(stem if "stem" in loss else model, pixels, labels, dtype, loss)
                    equal.setdefault((name, loss), []).append((found.sign() == true.sign())[kept])
                    dead.setdefault((name, loss), []).append((found == 0).flatten(1).all(dim=1).float())
    entropy = torch.cat(entropies)
    print(f"{len(entropy)} images, median cross-entropy {entropy.median():.2e}, {device}, torch {torch.__version__}")
    print(f"{'precision':<10}{'loss':<20}{'signs as in fp32':>18}{'images without gradient':>26}")
    for key, found in equal.items():
        share, gone = torch.cat(found).float().mean(), torch.cat(dead[key]).mean()
        print(f"{key[0]:<10}{key[1]:<20}{100 * share:>16.2f} %{100 * gone:>24.1f} %")


if __name__ == "__main__":
    main()
