"""AutoAttack through arrest-eval against a direct call of pyautoattack: the same verdicts? at what cost?

    python scripts/benchmarks/evaluate.py --model runs/mine/export --dataset cifar10 --limit-eval 200
    python scripts/benchmarks/evaluate.py --model ... --dataset ... --tricks channels_last,tf32,bf16,compile
    python scripts/benchmarks/evaluate.py --model ... --dataset ... --tricks attacks_in_tf32,attacks_in_bf16 --no-direct

Both run in this process on the same images, batch size and seed, one after the other; the figure is the ratio of their
times. ``--tricks`` runs arrest-eval again with each and says what share of the verdicts stays the same. Writes JSON.
With ``--emulate`` attacks in tf32 and bf16 round what they multiply and compute in fp32, for a CPU without such
arithmetic. That shows verdicts, and no speed.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from pyautoattack import AutoAttack
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from arrest_hub import evaluation, evaluator
from arrest_hub.attacks import frozen_eval
from arrest_hub.autoattack import library, standard_parts
from arrest_hub.data import to_pixels
from arrest_hub.eval_config import EvalConfig
from arrest_hub.eval_subjects import load_images, load_subject
from arrest_hub.evaluation import run_evaluation
from arrest_hub.machine import hardware_name, library_versions
from arrest_hub.validation import arithmetic

TRICKS = {
    "channels_last": {"channels_last": True},
    "tf32": {"precision": "tf32"},
    "bf16": {"precision": "bf16"},
    "compile": {"compile": True},
    "attacks_folded": {"channels_last": True, "fold_batchnorm": True},
    "attacks_in_tf32": {"attack_precision": "tf32"},
    "attacks_in_bf16": {"attack_precision": "bf16"},
}
PRODUCTS = {
    torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default, torch.ops.aten.addmm.default,
    torch.ops.aten.mm.default, torch.ops.aten.bmm.default,
}  # fmt: skip
NORMALISATIONS = {
    torch.ops.aten.native_batch_norm.default, torch.ops.aten.native_batch_norm_backward.default,
    torch.ops.aten._native_batch_norm_legit_no_training.default, torch.ops.aten.cudnn_batch_norm.default,
}  # fmt: skip


class Rounded(TorchDispatchMode):
    """Arithmetic of ``precision`` in that of float32: what is multiplied is rounded first, to the nearest, forward and
    backward; in bf16 what comes of it too, and of normalisations, as within autocast."""

    def __init__(self, precision: str) -> None:
        super().__init__()
        self.precision = precision

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        products = func in PRODUCTS
        if products and self.precision != "fp32":
            args = [self._round(x) if isinstance(x, torch.Tensor) and x.ndim > 1 else x for x in args]
        result = func(*args, **(kwargs or {}))
        if self.precision != "bf16" or not (products or func in NORMALISATIONS):
            return result
        if isinstance(result, torch.Tensor):
            return self._round(result)
        return tuple(self._round(x) if isinstance(x, torch.Tensor) and x.ndim > 1 else x for x in result)

    def _round(self, x: torch.Tensor) -> torch.Tensor:
        if self.precision == "bf16":
            return x.bfloat16().float()
        return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def emulate() -> None:
    """Let the attacks of an evaluation compute in `Rounded` where they would in less than fp32."""
    plain = evaluator.logits_function
    evaluation.precision_problems = lambda config: []
    evaluator.logits_function = lambda model, **options: plain(model, **(options | {"precision": "fp32"}))
    evaluator.Evaluator.searching = lambda self: Rounded(self.attack_precision)


class Logits(nn.Module):
    """A backbone as pyautoattack wants it: pixels in [0, 1] -> logits."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.backbone(pixels).logits


def direct(config: EvalConfig, accelerator: Accelerator) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(right when clean, right under attack, seconds) as pyautoattack's own evaluation has it."""
    subject = load_subject(config, accelerator)
    images = load_images(config, subject, accelerator).images
    items = [images[i] for i in range(len(images))]
    pixels = to_pixels(torch.stack([item["pixels"] for item in items]))
    labels = torch.tensor([item["label"] for item in items])
    model = Logits(subject.module.to(accelerator.device))
    suite = AutoAttack(model, norm={"linf": "Linf", "l2": "L2", "l1": "L1"}[config.norm], eps=config.eps_value,
                       seed=config.seed, device=accelerator.device)  # fmt: skip
    classes = subject.backbone.num_classes
    _, not_run = standard_parts(classes)
    if not_run:
        raise SystemExit(f"the direct call needs the standard parts: {not_run}")
    suite.apgd_targeted.n_target_classes = min(suite.apgd_targeted.n_target_classes, classes - 1)
    suite.fab.n_target_classes = min(suite.fab.n_target_classes, classes - 1)
    with frozen_eval(model), arithmetic("fp32"):
        started = time.perf_counter()
        adversarial, _ = suite.run_standard_evaluation(pixels, labels, batch_size=config.batch_size)
        seconds = time.perf_counter() - started
        with torch.no_grad():
            right = [
                torch.cat(
                    [
                        model(x[i : i + config.batch_size].to(accelerator.device)).argmax(1).cpu()
                        for i in range(0, len(x), config.batch_size)
                    ]
                )
                == labels
                for x in (pixels, adversarial)
            ]
    return right[0], right[1], seconds


def ours(config: EvalConfig, **changes: object) -> tuple[torch.Tensor, torch.Tensor, float, int]:
    """The same from arrest-eval, whose seconds are those of its clean and AutoAttack stages; and how many images were
    attacked again, because what fooled the network in the attack's arithmetic did not in fp32."""
    options = {**vars(config), "checks": False, "figures": False, "teacher": None, **changes}
    done = run_evaluation(EvalConfig(**options), write=False)
    seconds = sum(row.seconds for row in done.report.results)
    verdicts = done.verdicts
    again = sum(part.get("attacked_again", 0) for part in done.report.results[-1].attack_parameters["parts"])
    return (
        torch.from_numpy(verdicts.clean_correct), torch.from_numpy(verdicts.stands("autoattack")), seconds, again
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--norm", default="linf")
    parser.add_argument("--eps", default="8/255")
    parser.add_argument("--limit-eval", type=int)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--tricks", default="", help="of " + ", ".join(TRICKS))
    parser.add_argument("--no-direct", action="store_true", help="leave the direct call of pyautoattack out")
    parser.add_argument("--emulate", action="store_true", help="attacks in tf32 and bf16 by rounding")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    config = EvalConfig(
        model=args.model, dataset=args.dataset, norm=args.norm, eps=args.eps, limit_eval=args.limit_eval,
        batch_size=args.batch_size, attacks="clean,autoattack",
    ).validate()  # fmt: skip
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    if args.emulate:
        emulate()
    ratios, record = [], {}
    if args.no_direct:
        mine = ours(config)
        record = {"images": len(mine[0]), "clean": int(mine[0].sum()), "robust": int(mine[1].sum()),
                  "seconds": round(mine[2], 2)}  # fmt: skip
        print(json.dumps(record), flush=True)
    for repeat in range(0 if args.no_direct else args.repeats):
        # the order changes, so that neither always has the warmer machine
        first = direct(config, accelerator) if repeat % 2 == 0 else None
        mine = ours(config)
        theirs = first or direct(config, accelerator)
        assert torch.equal(mine[0], theirs[0]), "clean predictions differ"
        ratios.append(mine[2] / theirs[2])
        record = {
            "images": len(mine[0]), "clean": int(mine[0].sum()), "robust": int(mine[1].sum()),
            "verdicts_differing_from_direct": int((mine[1] != theirs[1]).sum()),
            "seconds": round(mine[2], 2), "direct_seconds": round(theirs[2], 2),
            "images_per_second": round(len(mine[0]) / mine[2], 2),
        }  # fmt: skip
        print(json.dumps(record | {"ratio": round(ratios[-1], 4)}), flush=True)
    record |= {"ratios": [round(ratio, 4) for ratio in ratios], "library": library(), "batch_size": args.batch_size,
               "hardware": hardware_name(accelerator), "versions": library_versions()}  # fmt: skip
    for name in [trick for trick in args.tricks.split(",") if trick]:
        other = ours(config, **TRICKS[name])
        record[name] = {
            "clean_verdicts_equal": float((other[0] == mine[0]).float().mean()),
            "robust_verdicts_equal": float((other[1] == mine[1]).float().mean()),
            "robust": int(other[1].sum()), "speed_up": round(mine[2] / other[2], 3),
        }  # fmt: skip
        if name.startswith("attacks"):
            stands, found = mine[1], other[1]
            record[name] |= {"stands_only_there": int((found & ~stands).sum()), "attacked_again": other[3],
                             "stands_only_in_fp32": int((stands & ~found).sum())}  # fmt: skip
            if args.emulate and "attack_precision" in TRICKS[name]:
                record[name] = {k: v for k, v in record[name].items() if k != "speed_up"} | {"emulated": True}
        print(name, json.dumps(record[name]), flush=True)
    if args.output:
        args.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
