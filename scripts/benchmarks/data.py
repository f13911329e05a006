"""Images per second of the input pipeline alone: reading, decoding, augmentation, with as many workers as wished.

    python scripts/benchmarks/data.py --dataset imagenet --model timm/resnet50.a1_in1k --num-workers 1,4,8

Where it is below the images/s that a training step takes (--dry-run, log.jsonl), the GPU waits; `data_wait` in
log.jsonl says for what share of the time.
"""

from __future__ import annotations

import argparse

from arrest_hub.backbones import load_backbone
from arrest_hub.data import load_splits, train_loader
from arrest_hub.data_speed import loader_images_per_second
from arrest_hub.errors import ArrestError
from arrest_hub.transforms import train_transform


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--model", default="resnet18_cifar", help="whose preprocessing to apply")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-workers", default="0,1,2", help="one number or several")
    parser.add_argument("--streaming", action="store_true")
    parser.add_argument("--seconds", type=float, default=5.0)
    args = parser.parse_args()
    try:
        measure(args)
    except (ArrestError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")


def measure(args: argparse.Namespace) -> None:
    splits = load_splits(args.dataset, streaming=args.streaming)
    wants = load_backbone(args.model, pretrained=False).preprocessing
    transform = train_transform(wants)
    print(f"{args.dataset}: {splits.train.name}, {wants.size[0]}x{wants.size[1]} px, batches of {args.batch_size}")
    for workers in map(int, args.num_workers.split(",")):
        loader = train_loader(splits.train, transform, batch_size=args.batch_size, seed=0, num_workers=workers)
        print(f"{workers} workers: {loader_images_per_second(loader, seconds=args.seconds):,.0f} images/s", flush=True)


if __name__ == "__main__":
    main()
