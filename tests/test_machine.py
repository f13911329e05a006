"""What this machine is said to be, and what it is said to be bad at."""

import pytest
import torch
from accelerate import Accelerator
from tiny import patterns, robust_net, tiny_config

import arrest_hub
from arrest_hub import machine
from arrest_hub.train import finetune

SAYS = "warning: this CPU has no arithmetic for bf16: a convolution takes 18 times as long as in fp32. Give "


def test_how_much_slower_bf16_is_here():
    threads = torch.get_num_threads()
    slowdown = machine.bf16_slowdown()
    assert torch.get_num_threads() == threads
    assert 0.05 < slowdown < 1000
    if torch.backends.mkldnn.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert slowdown > machine.SLOW


@pytest.mark.parametrize(("precision", "slowdown", "said"), [("bf16", 18.4, 1), ("bf16", 0.6, 0), ("no", 18.4, 0)])
def test_a_training_in_a_precision_that_the_cpu_emulates_is_warned_of(
    tmp_path, monkeypatch, capsys, precision, slowdown, said
):
    monkeypatch.setattr(machine, "bf16_slowdown", lambda: slowdown)
    finetune(tiny_config(tmp_path, mixed_precision=precision, epochs=1, limit_eval=6))
    assert capsys.readouterr().out.count(SAYS + "--mixed-precision no.") == said


@pytest.mark.parametrize(("precision", "said"), [("bf16", 1), ("fp32", 0)])
def test_so_is_an_evaluation(monkeypatch, capsys, precision, said):
    monkeypatch.setattr(machine, "bf16_slowdown", lambda: 18.4)
    options = {"attacks": "pgd-1", "checks": False, "teacher": None}
    arrest_hub.evaluate(robust_net(), patterns(4, 4), precision=precision, **options)
    assert capsys.readouterr().out.count(SAYS + "--precision fp32.") == said


def test_what_a_gpu_does_is_not_measured_on_the_cpu(monkeypatch):
    monkeypatch.setattr(machine, "bf16_slowdown", lambda: 18.4)
    accelerator = Accelerator(cpu=True)
    assert machine.bf16_warning(accelerator, "it")
    monkeypatch.setattr(type(accelerator), "device", torch.device("cuda"))
    assert machine.bf16_warning(accelerator, "it") is None
