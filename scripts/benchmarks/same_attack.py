"""Does the attack find the same with every exact option on as with all off? On a trained network and real images.

    python scripts/benchmarks/same_attack.py --model resnet18-folder --dataset cifar10-folder --images 256

Per step of PGD, both at the same point: the share of pixels whose gradient has the same sign. Pixels whose gradient is
zero in both count as the same. Then both attacks whole, from the same start, each along its own steps: the share of
pixels whose perturbation is the same, and the images whose verdict differs, each found and judged by its own network.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from arrest_hub.attacks import frozen_eval, margin, pgd, project, random_in_ball
from arrest_hub.backbones import load_backbone
from arrest_hub.config import FinetuneConfig
from arrest_hub.data import eval_loader, load_splits, to_pixels
from arrest_hub.machine import hardware_name, library_versions
from arrest_hub.prepare import new_accelerator
from arrest_hub.step import AUTOCAST, choose_images_at_once, for_eval_passes
from arrest_hub.train import set_options
from arrest_hub.transforms import eval_transform


def signs(network: nn.Module, pixels: Tensor, labels: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Of the gradient of the loss with respect to the pixels."""
    pixels = pixels.detach().requires_grad_(True)
    with torch.autocast(pixels.device.type, dtype=dtype, enabled=dtype is not None):
        loss = margin(network(pixels).logits, labels).sum()
    return torch.autograd.grad(loss, pixels)[0].sign()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--eps", default="8/255")
    parser.add_argument("--attack-steps", type=int, default=10)
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    config = FinetuneConfig(
        model=args.model, dataset=args.dataset, eps=args.eps, attack_steps=args.attack_steps,
        mixed_precision=args.mixed_precision,
    ).validate()  # fmt: skip
    accelerator = new_accelerator()
    device, dtype = accelerator.device, AUTOCAST[config.mixed_precision]
    plain = load_backbone(args.model).to(device)
    optioned = copy.deepcopy(plain)
    set_options(config, optioned)
    fast = for_eval_passes(config, optioned)
    config.images_at_once = choose_images_at_once(config, plain, device)
    at_once = config.images_at_once
    split = load_splits(args.dataset, limit_eval=args.images).test
    loader = eval_loader(split, eval_transform(plain.preprocessing), batch_size=args.batch_size, num_workers=0)
    generator = torch.Generator(device=device).manual_seed(0)
    same: list[list[Tensor]] = [[] for _ in range(args.attack_steps)]
    equal, verdicts = [], []
    numbers = {"eps": config.eps_value, "step_size": config.step_size_value, "norm": config.norm}
    with frozen_eval(plain), frozen_eval(fast):
        for batch in loader:
            pixels, labels = to_pixels(batch["pixels"]).to(device), batch["label"].to(device)
            start = random_in_ball(pixels, eps=config.eps_value, norm=config.norm, generator=generator)
            point = start
            for found in same:
                slow_signs, fast_signs = (signs(network, point, labels, dtype) for network in (plain, fast))
                found.append((slow_signs == fast_signs).float().flatten(1).mean(dim=1))
                moved = point + config.step_size_value * slow_signs
                point = project(moved, pixels, eps=config.eps_value, norm=config.norm)
            ends, stands = [], []
            for network, part in ((plain, None), (fast, at_once)):
                with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                    end = pgd(
                        lambda x, network=network: network(x).logits, pixels, labels, **numbers,
                        steps=args.attack_steps, start=start, images_at_once=part,
                    ).adversarial  # fmt: skip
                    with torch.no_grad():
                        stands.append(network(end).logits.argmax(dim=1) == labels)
                ends.append(end)
            equal.append(((ends[0] - ends[1]).abs() < 1e-6).float().flatten(1).mean(dim=1))
            verdicts.append(torch.stack(stands))
    shares = [float(torch.cat(found).mean()) for found in same]
    plain_stands, fast_stands = torch.cat(verdicts, dim=1)
    record = {
        "model": args.model, "images": len(plain_stands), "mixed_precision": config.mixed_precision, "eps": args.eps,
        "same_signs_per_step": shares, "same_perturbation_after_all_steps": float(torch.cat(equal).mean()),
        "stand_with_options_off": int(plain_stands.sum()), "stand_with_options_on": int(fast_stands.sum()),
        "verdicts_that_differ": int((plain_stands != fast_stands).sum()), "images_at_once": at_once,
        "hardware": hardware_name(accelerator), "versions": library_versions(),
    }  # fmt: skip
    print(f"{len(plain_stands)} images, precision {config.mixed_precision}, torch {torch.__version__}, {device}")
    print("same signs per step: " + ", ".join(f"{100 * share:.3f} %" for share in shares))
    print(f"same perturbation after {args.attack_steps} steps: "
          f"{100 * record['same_perturbation_after_all_steps']:.3f} % of the pixels")  # fmt: skip
    print(f"images that stand: {int(plain_stands.sum())} and {int(fast_stands.sum())}; verdicts that differ: "
          f"{record['verdicts_that_differ']}")  # fmt: skip
    if args.output:
        args.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
