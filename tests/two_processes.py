"""What test_distributed.py has two processes do together; prints a line of JSON, and so does no test by itself.

Its argument is the folder of `tiny_config`'s dataset and model.
"""

import dataclasses
import errno
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tiny import NAMES, TinyClassifier, patterns, tiny_backbone, tiny_config
from torch import nn
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from arrest_hub import eval_subjects, evaluator, processes
from arrest_hub.arrest import ArrestObjective
from arrest_hub.attacks import frozen_eval, pgd
from arrest_hub.backbones import load_backbone
from arrest_hub.command import leave
from arrest_hub.config import FinetuneConfig
from arrest_hub.data import to_pixels
from arrest_hub.errors import ArrestError, DataError
from arrest_hub.estimate import measure_steps
from arrest_hub.eval_config import EvalConfig
from arrest_hub.eval_subjects import module_subject
from arrest_hub.evaluation import evaluate
from arrest_hub.network_options import synchronise_batchnorm
from arrest_hub.prepare import new_accelerator, num_workers
from arrest_hub.processes import main_first
from arrest_hub.progress import Meter
from arrest_hub.step import train_step, worst_case
from arrest_hub.train import build_objective, finetune
from arrest_hub.validation import PgdSettings, count_correct
from arrest_hub.weight_perturbation import WeightPerturbation

EPS = 8 / 255


def steady_attack(logits_fn, pixels, labels, *, generator=None, steps=3):
    """PGD that draws nothing, so that the images find the same examples wherever they are attacked."""
    return pgd(logits_fn, pixels, labels, eps=EPS, step_size=EPS / 2, steps=steps, start=pixels)


def steady_noise(pixels, *, generator=None):
    return (pixels + EPS / 2).clamp(0, 1)


def vit() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        args = {"patch_size": 4, "embed_dim": 12, "depth": 1}
        return load_backbone("vit_tiny_patch16_224", num_classes=len(NAMES), image_size=8, model_args=args)


def batch_of(part: slice) -> dict[str, torch.Tensor]:
    pixels, labels = patterns(8, len(NAMES))
    return {"pixels": (255 * pixels[part]).to(torch.uint8), "label": labels[part], "index": torch.arange(8)[part]}


def objective_with(threshold, steps=3, teacher=None):
    return ArrestObjective(
        teacher or vit().requires_grad_(False), partial(steady_attack, steps=steps), steady_noise,
        rgkd_weight=2.0, replay_threshold=threshold, attack_steps=steps,
    )  # fmt: skip


def collectives(accelerator: Accelerator) -> dict[str, int]:
    """How many calls reach another process: in the attack alone, and in whole steps with few and many attack steps."""

    def count(call) -> int:
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            call()
        return sum(event.count for event in trace.key_averages() if event.key.startswith("c10d::"))

    net = TinyClassifier()
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.01))
    part = batch_of(slice(4 * accelerator.process_index, None, 2))
    teacher = TinyClassifier(seed=1).requires_grad_(False).eval()

    def step(steps: int) -> int:
        objective = objective_with(0.5, steps, teacher)
        return count(lambda: train_step(accelerator, model, net, objective, optimizer, part, torch.Generator(), None))

    def attack() -> None:
        with frozen_eval(net):
            steady_attack(lambda x: net(x).logits, to_pixels(part["pixels"]), part["label"])

    for _ in range(2):  # DistributedDataParallel arranges its buckets anew after the first
        step(1)
    wrapped = []
    model.register_forward_pre_hook(lambda *_: wrapped.append(1))
    found = {"attack": count(attack), "step": step(1), "long step": step(7)}
    return found | {"wrapped": len(wrapped), "is wrapped": int(model is not net)}


def rehearsed(accelerator: Accelerator) -> int:
    """How many calls reach another process where a step is rehearsed, of a network whose weights are perturbed and
    whose BatchNorm is synchronised: a process may run out of memory in it, and none may wait for that one."""
    config = FinetuneConfig(model="m", dataset="d", method="at", attack_steps=1, awp_gamma=0.01).validate()
    network = tiny_backbone()
    synchronise_batchnorm(network)
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        measure_steps(config, accelerator, network, partial(build_objective, config), 4, steps=1)
    return sum(event.count for event in trace.key_averages() if event.key.startswith("c10d::"))


def workers_chosen(accelerator: Accelerator, *, streaming: bool) -> list[int]:
    """Loader processes that each process chooses, where the first may use eight cores and the second twenty."""
    cores = set(range((8, 20)[accelerator.process_index]))
    with patch.object(os, "sched_getaffinity", lambda pid: cores, create=True):
        return gather_object([num_workers(None, accelerator, streaming=streaming)])


def waited_for_one(accelerator: Accelerator, slow: int) -> list[str]:
    """What each process loads where one of them takes longer than processes wait for each other in a collective."""
    _set_pg_timeout(timedelta(seconds=2))

    def load() -> str:
        if accelerator.process_index == slow:
            time.sleep(4)
        return "loaded"

    return gather_object([main_first(accelerator, load)])


def full_disk(*arguments: object, **keywords: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def load_that_fails(accelerator: Accelerator) -> dict[str, list[str]]:
    """What each process is told where the second cannot load what the first could, or nothing is heard of it."""

    def load(fail: Callable[[], None]) -> str:
        if accelerator.process_index == 1:
            fail()
        return "loaded"

    def missing() -> None:
        raise DataError("no such folder here")

    ways = {"missing": missing, "full": full_disk, "silent": partial(time.sleep, 2)}
    with patch.object(processes, "SILENCE", 0.5):
        return {name: told(accelerator, partial(main_first, accelerator, partial(load, way)))
                for name, way in ways.items()}  # fmt: skip


def evaluated(accelerator: Accelerator) -> dict[str, list[object]]:
    """What each process is told of an evaluation where one finds an image that cannot be classified, and where they
    are given other images; and the figures of a network in DistributedDataParallel and of that network."""
    pixels, labels = patterns(20, len(NAMES))
    check, rank = evaluator._check_logits, accelerator.process_index

    def fails_in_one(*arguments: object) -> None:
        if rank == 1:
            raise ArrestError("not finite")
        check(*arguments)

    def figures(network: nn.Module, images: torch.Tensor = pixels) -> list[int]:
        report = evaluate(network, (images, labels), attacks="pgd-2", batch_size=4, checks=False, figures=False)
        return [row.correct for row in report.results]

    network = tiny_backbone(len(NAMES))
    wrapped = nn.parallel.DistributedDataParallel(tiny_backbone(len(NAMES)))
    found = {"network": gather_object([figures(network)]), "wrapped": gather_object([figures(wrapped)])}
    with patch.object(evaluator, "_check_logits", fails_in_one):
        found["failing"] = told(accelerator, lambda: figures(network))
    return found | {"other images": told(accelerator, lambda: figures(network, pixels.roll(rank, 0)))}


def told(accelerator: Accelerator, call: Callable[[], object]) -> list[str]:
    """What each process is told by ``call``, which fails."""
    try:
        said = f"returned {call()}"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    return gather_object([said])


def disks_that_are_full(accelerator: Accelerator, folder: Path) -> dict[str, list[str]]:
    """What each process is told where the main one cannot write: a run's teacher, export, card, log or lock, an
    evaluation's record. None may wait for it."""
    found = {}
    config = tiny_config(folder, output_dir=str(folder / "full"), max_steps=1, validation_size=0)
    for name, place, changes in (
        ("teacher", "arrest_hub.run.write_model_folder", {"standard_epochs": 1}),
        ("export", "arrest_hub.finish.write_model_folder", {}),
        ("card", "arrest_hub.finish.render_card", {}),
        ("log", "accelerate.Accelerator.log", {}),
        ("lock", "arrest_hub.run_folder._lock", {}),
    ):
        run = dataclasses.replace(config, overwrite=True, **changes)
        with patch(place, full_disk):
            found[name] = told(accelerator, partial(finetune, run))
    with patch("arrest_hub.evaluation.write_record", full_disk):
        found["record"] = told(accelerator, lambda: evaluate(
            config.model, config.dataset, attacks="clean", checks=False, figures=False, output_dir=folder / "eval",
        ))  # fmt: skip
    return found


def teacher_of_one_disk(accelerator: Accelerator) -> list[str | None]:
    """The teacher of each process, where only the first one's disk has the run that tells of it."""
    subject = module_subject(tiny_backbone(len(NAMES)), "mine")
    config, notes = EvalConfig(model="mine", dataset="data").validate(), []
    found = {0: "resnet18_cifar", 1: None}[accelerator.process_index]
    network = tiny_backbone(len(NAMES))
    network.source = dataclasses.replace(network.source, pretrained=True)
    with (
        patch.object(eval_subjects, "find_teacher", lambda subject: found),
        patch.object(eval_subjects, "load_backbone", lambda *args, **kwargs: network),
    ):
        teacher = eval_subjects.load_teacher(config, subject, len(NAMES), accelerator, notes)
    return gather_object([teacher and teacher.name])


def one_rank_replays_all(accelerator: Accelerator) -> dict[str, float]:
    """The largest difference between the weights after three steps of two processes, of which one finds nothing to
    attack, and of one process with the same images and thresholds; and the replay rate that is logged."""
    net = vit()
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.05))
    rank, meter = accelerator.process_index, Meter()
    objective = objective_with((2.0, -1.0)[rank])
    part = batch_of(slice(4 * rank, 4 * rank + 4))
    alone = vit()
    own = torch.optim.SGD(alone.parameters(), lr=0.05)
    whole, per_sample = batch_of(slice(None)), objective_with(torch.tensor([2.0] * 4 + [-1.0] * 4))
    for _ in range(3):
        parts = train_step(accelerator, model, net, objective, optimizer, part, torch.Generator(), None)
        meter.add(parts, 1, part["index"])
        own.zero_grad()
        per_sample(alone, alone, to_pixels(whole["pixels"]), whole["label"], torch.Generator())["loss"].backward()
        own.step()
    pairs = zip(net.parameters(), alone.parameters(), strict=True)
    return {
        "difference": max(float((a - b).detach().abs().max()) for a, b in pairs),
        "moved": max(
            float((a - b).detach().abs().max()) for a, b in zip(net.parameters(), vit().parameters(), strict=True)
        ),
        "replay rate": meter.reduce(accelerator)["replay_rate"],
    }


def perturbed_together(accelerator: Accelerator) -> dict[str, float]:
    """The largest difference between the weights after three steps with adversarial weight perturbation of two
    processes and of one with the same images; how far they moved, and how far the perturbation moved them."""
    net, alone, plain = vit(), vit(), vit()
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.05))
    own, rank = torch.optim.SGD(alone.parameters(), lr=0.05), accelerator.process_index
    average = partial(accelerator.reduce, reduction="mean")
    together = WeightPerturbation(net, 0.05, average=average)
    one, objective = WeightPerturbation(alone, 0.05), objective_with(None)
    whole, part = batch_of(slice(None)), batch_of(slice(4 * rank, 4 * rank + 4))
    bare = torch.optim.SGD(plain.parameters(), lr=0.05)
    for _ in range(3):
        train_step(accelerator, model, net, objective, optimizer, part, torch.Generator(), None, together)
        for network, its, perturbation in ((alone, own, one), (plain, bare, None)):
            its.zero_grad()
            pixels = to_pixels(whole["pixels"])
            prepared = objective.prepare(network.train(), pixels, whole["label"], torch.Generator())
            with worst_case(accelerator, objective, prepared, perturbation):
                objective.loss(network, prepared)["loss"].backward()
            its.step()

    def apart(first: nn.Module, second: nn.Module) -> float:
        pairs = zip(first.parameters(), second.parameters(), strict=True)
        return max(float((a - b).detach().abs().max()) for a, b in pairs)

    return {"difference": apart(net, alone), "moved": apart(net, vit()), "perturbed": apart(alone, plain)}


def counted(accelerator: Accelerator) -> dict[str, list[int]]:
    """Images counted, and found right, where the last batch is uneven and where there are fewer than processes."""
    settings = PgdSettings("linf", EPS, EPS / 2, 1)
    result = {}
    for size in (1, 5, 8):
        pixels, labels = patterns(size, len(NAMES))
        rows = [
            {"pixels": (255 * x).to(torch.uint8), "label": int(y), "index": i}
            for i, (x, y) in enumerate(zip(pixels, labels, strict=True))
        ]
        net = vit()
        with torch.no_grad():
            right = int((net((255 * pixels).to(torch.uint8) / 255).logits.argmax(1) == labels).sum())
        loader = accelerator.prepare(DataLoader(rows, 2))
        counts = count_correct(net, loader, accelerator, settings, seed=0, description="", total=size)
        result[str(size)] = [counts.n, counts.clean, right]
    return result


if __name__ == "__main__":
    together = new_accelerator()
    found = {
        "collectives": collectives(together),
        "replay": one_rank_replays_all(together),
        "perturbed": perturbed_together(together),
        "counted": counted(together),
        "rehearsed": rehearsed(together),
        "workers": [workers_chosen(together, streaming=streaming) for streaming in (False, True)],
        "load that fails": load_that_fails(together),
        "teacher": teacher_of_one_disk(together),
        "full disks": disks_that_are_full(together, Path(sys.argv[1])),
        "evaluated": evaluated(together),
        # the last: the others would have little time after it
        "waited": [waited_for_one(together, slow) for slow in (0, 1)],
    }
    together.print(json.dumps(found))
    together.end_training()
    leave(0)  # as the command does: Gloo's threads may outlive the group
