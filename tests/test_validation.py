import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from tiny import TinyClassifier, tiny_config
from torch.utils.data import DataLoader

from arrest_hub import epoch_validation, validation
from arrest_hub.attacks import frozen_eval, pgd
from arrest_hub.backbones import BackboneOutput
from arrest_hub.config import FinetuneConfig
from arrest_hub.machine import hardware_name, processor_name
from arrest_hub.seeding import derive_seed
from arrest_hub.step import GRADIENT_SCALE, validation_attack
from arrest_hub.train import finetune
from arrest_hub.validation import PgdSettings, arithmetic, count_correct, to_results


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return [
        {"pixels": torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8, generator=generator), "label": i % 3, "index": i}
        for i in range(21)
    ]


SETTINGS = PgdSettings("linf", 0.02, 0.01, 4)


def count(model, images, settings, batch_size=8, seed=0):
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(DataLoader(images, batch_size))
    return count_correct(model, loader, accelerator, settings, seed=seed, description="test", total=21)


def test_counts_equal_a_plain_loop(images):
    model = TinyClassifier().train()
    counts = count(model, images, SETTINGS)
    assert model.training, "left as it was"
    clean = robust = 0
    with frozen_eval(model):
        for start in range(0, 21, 8):
            batch = images[start : start + 8]
            pixels = torch.stack([image["pixels"] for image in batch]).float() / 255
            labels = torch.tensor([image["label"] for image in batch])
            right = model(pixels).logits.argmax(1) == labels
            clean += int(right.sum())
            if right.any():
                adversarial = pgd(
                    lambda x: model(x).logits, pixels[right], labels[right], eps=0.02, step_size=0.01, steps=4,
                    generator=torch.Generator().manual_seed(derive_seed(0, "evaluate", start)),
                ).adversarial  # fmt: skip
                robust += int((model(adversarial).logits.argmax(1) == labels[right]).sum())
    assert (counts.n, counts.clean, counts.robust) == (21, clean, robust)
    assert 0 < clean < 21


def test_every_batch_is_attacked_from_a_start_of_its_own_and_of_the_seed(images, monkeypatch):
    seeds = []

    def remembered(*args, generator, **options):
        seeds.append(generator.initial_seed())
        return pgd(*args, generator=generator, **options)

    monkeypatch.setattr(validation, "pgd", remembered)
    for seed in (0, 1, 0):
        count(TinyClassifier(), images, SETTINGS, seed=seed)
    assert len(seeds) == 9
    assert len(set(seeds)) == 6
    assert seeds[:3] == seeds[6:]


def test_all_passes_may_be_of_one_size(images):
    """As compiled networks want them: another size would be another graph, or one for all sizes."""
    settings = PgdSettings("linf", 0.05, 0.0125, 10)
    sizes, plain = set(), count(TinyClassifier(), images, settings)
    model = TinyClassifier()
    model.register_forward_pre_hook(lambda module, inputs: sizes.add(len(inputs[0])))
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(DataLoader(images, 8))  # the last batch has five
    options = {"seed": 0, "description": "test", "total": 21, "fill_to": 8}
    found = count_correct(model, loader, accelerator, settings, **options)
    assert sizes == {8}
    assert (found.n, found.clean) == (plain.n, plain.clean)
    assert abs(found.robust - plain.robust) <= 2, "but for the start of the attack"
    assert 0 < found.robust < found.clean
    sizes.clear()
    few = accelerator.prepare(DataLoader(images[:3], 8))
    assert count_correct(model, few, accelerator, settings, **options).n == 3
    assert sizes == {8}, "also where all of them are fewer than a batch"


class Broken(TinyClassifier):
    """Logits that are not finite, from which argmax makes class 0."""

    def __init__(self, value, only_under_attack):
        super().__init__()
        self.value, self.only_under_attack = value, only_under_attack

    def forward(self, pixels):
        logits, representation = super().forward(pixels)
        whole = (pixels * 255 - (pixels * 255).round()).abs().amax(dim=(1, 2, 3)) < 1e-3  # what no attack has moved
        keep = whole if self.only_under_attack else torch.zeros_like(whole)
        return BackboneOutput(torch.where(keep[:, None], logits, self.value), representation)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_not_correct(images, value):
    settings = PgdSettings("linf", 0.05, 0.0125, 2)
    plain = count(TinyClassifier(), images, settings)
    assert count(Broken(value, False), images, settings)[:3] == (21, 0, 0)
    assert count(Broken(value, True), images, settings)[:3] == (21, plain.clean, 0)


class Misled(TinyClassifier):
    """The same logits, with the gradient turned round: what attacks it makes wrong images right."""

    def forward(self, pixels):
        logits, representation = super().forward(pixels)
        return BackboneOutput(2 * logits.detach() - logits, representation)


def test_what_is_wrong_when_clean_is_wrong_under_attack(images):
    """Also where such images are attacked, so that shapes stay the same."""
    accelerator, settings = Accelerator(cpu=True), PgdSettings("linf", 0.3, 0.05, 10)
    loader = accelerator.prepare(DataLoader(images, 8))
    options = {"seed": 0, "description": "test", "total": 21, "fill_to": 8}
    found = count_correct(Misled(), loader, accelerator, settings, **options)
    assert found.robust == found.clean < 21
    model, pixels = Misled(), torch.stack([image["pixels"] for image in images]).float() / 255
    labels = torch.tensor([image["label"] for image in images])
    with frozen_eval(model):
        moved = pgd(lambda x: model(x).logits, pixels, labels, eps=0.3, step_size=0.05, steps=10).adversarial
        assert (model(moved).logits.argmax(1) == labels).sum() > found.clean, "some do become right"


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_clean_passes_and_attack_are_in_the_precision_of_the_training(tmp_path, monkeypatch, precision):
    seen, plain = [], validation.count_correct

    def counted(model, *args, **options):
        def look(module, inputs):
            seen.append((torch.is_autocast_enabled("cpu"), inputs[0].requires_grad))

        hook = model.register_forward_pre_hook(look)
        try:
            return plain(model, *args, **options)
        finally:
            hook.remove()

    monkeypatch.setattr(epoch_validation, "count_correct", counted)
    finetune(tiny_config(tmp_path, epochs=1, mixed_precision=precision, limit_eval=6))
    assert set(seen) == {(precision == "bf16", True), (precision == "bf16", False)}


def test_a_stronger_attack_is_not_survived_more_often(images):
    model = TinyClassifier().eval()
    robust = [count(model, images, PgdSettings("linf", eps, eps / 4, 10)).robust for eps in (1e-6, 0.05, 0.5)]
    counts = count(model, images, None)
    assert robust[0] == counts.clean
    assert robust[0] >= robust[1] >= robust[2]
    assert robust[2] == 0
    assert counts.robust == 0, "no attack was asked for"


def test_arithmetic_switches_tf32_off_and_back():
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    with arithmetic("fp32"):
        assert torch.backends.cudnn.deterministic
        assert not torch.backends.cudnn.benchmark
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.benchmark
    assert not torch.backends.cudnn.deterministic
    torch.backends.cudnn.benchmark = False
    with arithmetic("tf32"):
        assert torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = before


AS_THE_CALLER_CHOSE = """
import os, sys, torch
from arrest_hub.tf32 import tf32_allowed
from arrest_hub.validation import arithmetic
B = torch.backends
def switches():
    modules = B, B.cuda.matmul, B.cudnn, B.cudnn.conv, B.cudnn.rnn, B.mkldnn.matmul, B.mkldnn.conv, B.mkldnn.rnn
    return [module.fp32_precision for module in modules]
for case in sys.argv[1:]:
    if os.fork():  # each in a process where nothing was chosen before
        assert os.wait()[1] == 0
        continue
    for line in case.split("; "):
        if line == "once":
            with arithmetic("fp32"):
                pass
        else:
            exec(line)
    before, found = switches(), [tf32_allowed()]
    for precision in ("fp32", "tf32"):
        with arithmetic(precision):
            found.append(tf32_allowed())
            assert switches()[-3:] == ["ieee"] * 3, "nothing less on a CPU"
    assert switches() == before
    print(case, *found, flush=True)
    os._exit(0)
"""


def test_arithmetic_whatever_the_caller_chose_and_how():
    """By torch's older switches, its newer ones, or both; (convolutions, products) may be in TF32 before."""
    probe = "import torch; torch.backends.fp32_precision = 'ieee'; print(torch.backends.cudnn.conv.fp32_precision)"
    kept = subprocess.check_output([sys.executable, "-c", probe], text=True).strip() == "tf32"  # torch 2.11
    cases = {
        "B.fp32_precision = 'ieee'": (kept, False), "B.fp32_precision = 'tf32'": (True, True),
        "B.cuda.matmul.fp32_precision = 'tf32'": (True, True), "B.cudnn.fp32_precision = 'ieee'": (kept, False),
        "B.cudnn.conv.fp32_precision = 'ieee'": (False, False),
        "B.mkldnn.matmul.fp32_precision = 'bf16'": (True, False),
        "B.cudnn.allow_tf32 = False": (False, False), "B.cuda.matmul.allow_tf32 = True": (True, True),
        "torch.set_float32_matmul_precision('medium')": (True, True),
        "torch.set_float32_matmul_precision('highest'); B.fp32_precision = 'tf32'": (True, False),
        "B.fp32_precision = 'tf32'; B.cuda.matmul.fp32_precision = 'ieee'": (True, False),
        "once; B.fp32_precision = 'tf32'": (True, True), "once; B.cudnn.fp32_precision = 'tf32'": (True, True),
    }  # fmt: skip
    command = [sys.executable, "-c", AS_THE_CALLER_CHOSE, *cases]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    expected = [f"{case} {allowed} {(False, False)} {(True, True)}" for case, allowed in cases.items()]
    assert done.stdout.splitlines() == expected


def test_results_name_the_attack(images):
    counts = count(TinyClassifier().eval(), images, SETTINGS)
    clean, robust = to_results(counts, SETTINGS, eps="5/255", dataset="d", split="test", seed=3)
    assert (clean.attack, clean.correct, clean.n) == (None, counts.clean, 21)
    assert (robust.attack, robust.norm, robust.eps, robust.correct) == ("pgd-4", "linf", "5/255", counts.robust)
    assert robust.attack_parameters["step_size"] == 0.01


def test_the_hardware_is_named(tmp_path, monkeypatch):
    facts = tmp_path / "cpuinfo"
    facts.write_text("processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC 9B14\n\nprocessor\t: 1\n")
    assert processor_name(facts) == "AMD EPYC 9B14"
    facts.write_text("processor\t: 0\nFeatures\t: fp asimd\n")  # as on ARM
    assert processor_name(facts) == ""
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    monkeypatch.setattr("platform.processor", lambda: "Apple M3")
    assert processor_name(tmp_path / "none") == "Apple M3"
    monkeypatch.setattr("platform.processor", lambda: "arm64")
    assert processor_name(tmp_path / "none") == "", "the architecture is said already"

    monkeypatch.setattr("arrest_hub.machine.processor_name", lambda: "")
    threads = torch.get_num_threads()
    assert hardware_name(Accelerator(cpu=True)) == f"1 x CPU (arm64, {threads} threads)"
    monkeypatch.setattr("arrest_hub.machine.processor_name", lambda: "Apple M3")
    assert hardware_name(Accelerator(cpu=True)) == f"1 x CPU (Apple M3, arm64, {threads} threads)"


class Faint(torch.nn.Module):
    """A linear network in part in fp16, whose gradient to the pixels is next to nothing."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(1e-4 * torch.randn(192, 3, generator=torch.Generator().manual_seed(0)))

    def forward(self, pixels):
        hidden = ((pixels - 0.5).flatten(1).half() * 1e-4).float()
        return BackboneOutput(hidden @ self.weight, hidden)


def test_an_attack_in_half_precision_does_not_underflow(images):
    """With the factor on the loss that training has in fp16."""
    settings = PgdSettings("linf", 0.1, 0.05, 4)
    blind = count(Faint(), images, settings)
    seeing = count(Faint(), images, settings._replace(gradient_scale=GRADIENT_SCALE))
    assert blind.clean == seeing.clean >= 5
    assert seeing.robust < blind.robust
    assert seeing.robust == 0
    config = FinetuneConfig(model="m", dataset="d", eps="8/255", eps_train="10/255", attack_steps=7)
    for precision, scale in (("no", 1.0), ("bf16", 1.0), ("fp16", GRADIENT_SCALE)):
        chosen = validation_attack(dataclasses.replace(config, mixed_precision=precision), 3)
        assert chosen == PgdSettings("linf", 8 / 255, config.step_size_for(8 / 255), 7, 3, scale)


def test_what_fills_a_batch_up_is_not_counted():
    """Also where the batches come from no loader of Accelerate's, which would cut the last one itself."""
    pixels = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = {"pixels": pixels, "label": torch.arange(5) % 3, "index": torch.arange(5)}
    counts = [
        count_correct(TinyClassifier(), [batch], Accelerator(cpu=True), None, seed=0, description="t", total=5, **more)
        for more in ({}, {"fill_to": 8})
    ]
    assert counts[1].n == 5
    assert counts[0][:3] == counts[1][:3]
