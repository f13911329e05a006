"""Where the time of a step goes: every second once, and the operations of a network as counted by hand."""

import time

import pytest
import timm
import torch
from test_train import log_lines
from tiny import tiny_backbone, tiny_config

from arrest_hub import loop, throughput
from arrest_hub.throughput import Pace, Stopwatch, Utilisation, forward_flops, peak_flops, step_flops, time_shares
from arrest_hub.train import finetune

CPU = torch.device("cpu")


def test_a_stopwatch_adds_up_and_starts_anew():
    watch = Stopwatch(CPU)
    for _ in range(2):
        with watch("step"):
            time.sleep(0.02)
            with watch("attack"):
                time.sleep(0.02)
    seconds = watch.read()
    assert seconds.keys() == {"step", "attack"}
    assert 0.04 <= seconds["attack"] <= seconds["step"] - 0.04
    assert watch.read() == {}


def test_shares():
    seconds = {"step": 8.0, "attack": 5.0, "teacher": 0.5, "drift": 0.5}
    assert time_shares(seconds, 10.0) == {"training_share": 0.2, "attack_share": 0.5, "teacher_share": 0.1}
    assert time_shares({"step": 8.0}, 10.0) == {"training_share": 0.8}


def test_operations_are_those_counted_by_hand():
    assert forward_flops(torch.nn.Conv2d(3, 4, 3, padding=1), torch.rand(2, 3, 8, 8)) == 2 * 8 * 8 * 4 * 3 * 9
    # 4.09 GMACs, of which 0.05 % are pooling and other things that are not counted (He et al. 2016 say 3.8 for v1)
    flops = forward_flops(timm.create_model("resnet50"), torch.rand(1, 3, 224, 224))
    assert flops == pytest.approx(2 * 4.09e9, rel=2e-3)
    model = tiny_backbone().train()
    forward_flops(model, torch.rand(1, 3, 8, 8))
    assert model.training


def test_operations_of_a_step():
    assert step_flops(1.0, {"attack": 10, "training": 1, "teacher": 1, "drift": 1}) == 20 + 3 + 1 + 1
    assert step_flops(2.0, {"training": 1}) == 6


def test_utilisation(monkeypatch):
    passes = {"attack": 10, "training": 1}
    assert Utilisation(tiny_backbone(), (8, 8), passes, CPU, "bf16", 1).read(100.0, 10.0) == {}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 10**9)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    gpu = torch.device("cuda")
    assert peak_flops(gpu, "bf16") == 989e12
    use = Utilisation(tiny_backbone(), (8, 8), passes, gpu, "bf16", 2)
    values = use.read(1000.0, 5.0)
    forward = forward_flops(tiny_backbone(), torch.rand(1, 3, 8, 8))
    assert values == {"peak_memory_gb": 3.0, "mfu": pytest.approx(1000 * forward * (10 + 3) / (2 * 989e12))}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 9090")
    assert Utilisation(tiny_backbone(), (8, 8), passes, gpu, "bf16", 2).read(1000.0, 10.0) == {"peak_memory_gb": 3.0}


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H200 NVL", "fp16", 835e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("NVIDIA L40", "bf16", None),
        ("NVIDIA A10G", "bf16", None),
        ("NVIDIA RTX A1000", "bf16", None),
        ("Tesla V100-SXM2-16GB", "fp16", 125e12),
        ("Tesla V100-SXM2-16GB", "bf16", None),  # it has no such tensor cores
        ("Tesla T4", "no", 8.1e12),
        ("NVIDIA A100-SXM4-80GB", "no", None),  # convolutions in TF32, products not
    ],
)
def test_a_peak_is_that_gpus_or_unknown(name, precision, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert peak_flops(torch.device("cuda"), precision) == peak


def test_attention_is_counted():
    vit = timm.create_model("test_vit")
    images = torch.rand(1, 3, 160, 160)
    fused = forward_flops(vit, images)
    for block in vit.blocks:
        block.attn.fused_attn = False
    assert fused == forward_flops(vit, images)


def test_a_pause_takes_no_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    pace = Pace(CPU, Utilisation(tiny_backbone(), (8, 8), {"training": 1}, CPU, "no", 1))
    with pace.stopwatch("step"):
        now[0] += 2.0
    pace.add(8)
    with pace.paused():
        now[0] += 100.0
    now[0] += 2.0
    assert pace.read(0.0) == {"images_per_second": 2.0, "data_wait": 0.0, "training_share": 0.5}


@pytest.mark.parametrize("method", ["arrest", "at", "trades"])
def test_the_log_says_where_the_time_went(method, tmp_path, monkeypatch):
    """In every line the parts are a whole at most, also where a validation lies between two lines."""
    monkeypatch.setattr(loop, "validate", slow(loop.validate))
    # four steps an epoch, a line every three
    finetune(tiny_config(tmp_path, method=method, log_every=3))
    lines = [line for line in log_lines(tmp_path / "run", drop=()) if "loss" in line]
    assert len(lines) == 3
    for line in lines:
        shares = [line["attack_share"], line["training_share"], line["data_wait"], line.get("teacher_share", 0.0)]
        assert all(share >= 0 for share in shares)
        assert 0.1 < sum(shares) <= 1.0 + 1e-5
        assert ("teacher_share" in line) == (method != "at")
        assert line["attack_share"] > line["data_wait"]
        assert line["images_per_second"] > 0


def slow(validate):
    def wrapped(*args):
        time.sleep(0.5)
        return validate(*args)

    return wrapped
