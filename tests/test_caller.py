"""A call works as in a process of its own, and leaves its caller's as it was."""

import contextlib
import json
import multiprocessing
import os
import threading
import time
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny import patterns, robust_net, tiny_config, write_model

import arrest_hub
from arrest_hub.caller import own_forward, undisturbed
from arrest_hub.errors import ConfigError
from arrest_hub.export import weights_digest
from arrest_hub.tf32 import tf32_allowed
from arrest_hub.train import finetune
from arrest_hub.validation import arithmetic


def evaluated(net=None, pair=None):
    pair = pair or patterns(12, 4, seed=7)
    options = {"attacks": "clean,apgd-ce", "checks": False, "num_workers": 0, "teacher": None, "eps": "26/255"}
    return [row.correct for row in arrest_hub.evaluate(net or robust_net(), pair, **options).results]


def steps(accelerator, net):
    found = []
    for _ in range(8):
        with accelerator.accumulate(net):
            found.append(accelerator.sync_gradients)
    return found


def test_the_callers_accelerator_goes_on_as_it_was(tmp_path):
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4, mixed_precision="bf16")
    net = torch.nn.Linear(2, 2)
    before = steps(accelerator, net)
    assert before.count(True) == 2
    evaluated()
    finetune(tiny_config(tmp_path, max_steps=1))
    assert accelerator.mixed_precision == "bf16"
    assert steps(accelerator, net) == before


def test_a_prepared_network_is_evaluated_in_the_precision_that_is_recorded():
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    net, seen = torch.nn.Sequential(robust_net()), []
    prepared = accelerator.unwrap_model(accelerator.prepare(net))
    net[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    forward = prepared.forward
    assert prepared(patterns(2, 4)[0]).dtype == torch.float32
    assert seen == [torch.bfloat16]
    options = {"attacks": "pgd-1", "checks": False}
    arrest_hub.evaluate(prepared, patterns(4, 4), teacher=prepared, fold_batchnorm=True, **options)
    with pytest.raises(ConfigError):
        arrest_hub.evaluate(prepared, (torch.full((2, 3, 8, 8), 2.0), torch.zeros(2).long()), teacher=None, **options)
    assert set(seen[1:]) == {torch.float32}
    assert prepared.forward == forward, "and is left as it was"
    AcceleratorState._reset_state()


def test_two_at_once_leave_a_prepared_network_prepared():
    AcceleratorState._reset_state()
    net = Accelerator(cpu=True, mixed_precision="bf16").prepare(robust_net())
    forward, inside, out = net.forward, threading.Event(), threading.Event()

    def other():
        with own_forward(net):
            inside.set()
            out.wait(20)
            assert net.forward != forward

    thread = threading.Thread(target=other)
    with own_forward(net):
        thread.start()
        inside.wait(20)
    assert net.forward != forward, "the other is still at it"
    out.set()
    thread.join()
    assert net.forward == forward
    AcceleratorState._reset_state()


def test_a_forward_that_is_not_accelerates_stays():
    """Of a name that others use too."""
    net = robust_net()
    net._original_forward = net.forward
    net.forward = lambda pixels: -net._original_forward(pixels)
    pixels, labels = patterns(12, 4, seed=7)
    right = int((net(pixels).argmax(dim=1) == labels).sum())
    assert evaluated(net, (pixels, labels))[0] == right < 12


def test_loading_in_threads_leaves_the_default_dtype_to_the_last(tmp_path):
    folder, dtypes, errors = write_model(tmp_path / "model"), set(), []

    def load():
        try:
            for _ in range(6):
                dtypes.update(parameter.dtype for parameter in arrest_hub.load(folder).parameters())
        except Exception as error:
            errors.append(error)

    torch.set_default_dtype(torch.float64)
    try:
        threads = [threading.Thread(target=load) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert not errors
    assert dtypes == {torch.float32}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_process_forked_meanwhile_measures_too():
    context, busy, done = multiprocessing.get_context("fork"), threading.Event(), threading.Event()

    def measure():
        with arithmetic():
            busy.set()
            done.wait(20)

    thread = threading.Thread(target=measure)
    thread.start()
    busy.wait(20)
    child = context.Process(target=arithmetic().__enter__)
    child.start()
    child.join(20)
    done.set()
    thread.join()
    assert child.exitcode == 0


@pytest.mark.parametrize("setting", ["bf16", "float64", "inference", "no_grad", "meta"])
def test_a_network_is_loaded_whatever_the_caller_has_set(tmp_path, setting):
    folder = write_model(tmp_path / "model")
    expected, pair = arrest_hub.load(folder), patterns(6, 3)
    options = {"attacks": "pgd-1", "teacher": None, "checks": False}
    dtype = {"bf16": torch.bfloat16, "float64": torch.float64}.get(setting, torch.float32)
    mode = {"inference": torch.inference_mode, "no_grad": torch.no_grad}.get(setting, contextlib.nullcontext)
    try:
        torch.set_default_dtype(dtype)
        torch.set_default_device("meta" if setting == "meta" else "cpu")
        with mode():
            found = arrest_hub.load(folder)
            figures = [row.correct for row in arrest_hub.evaluate(folder, pair, **options).results]
        assert torch.get_default_dtype() == dtype
        assert torch.get_default_device().type == ("meta" if setting == "meta" else "cpu")
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    for parameter, same in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(parameter, same)
        assert parameter.requires_grad is same.requires_grad
    assert [row.correct for row in arrest_hub.evaluate(found, pair, **options).results] == figures


def test_calls_at_once_leave_the_switches_as_they_were():
    """And each measures in its own arithmetic."""
    cudnn, both = torch.backends.cudnn, threading.Barrier(2)
    before = cudnn.deterministic, cudnn.benchmark
    seen = []

    def measure(precision):
        both.wait()
        for _ in range(20):
            with arithmetic(precision):
                time.sleep(0.001)
                seen.append((precision, *tf32_allowed(), cudnn.deterministic))

    cudnn.benchmark = True
    try:
        threads = [threading.Thread(target=measure, args=(precision,)) for precision in ("fp32", "tf32")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (cudnn.deterministic, cudnn.benchmark) == (before[0], True)
    finally:
        cudnn.benchmark = before[1]
    assert set(seen) == {("fp32", False, False, True), ("tf32", True, True, True)}


def test_an_accelerator_may_be_made_afterwards():
    AcceleratorState._reset_state()
    evaluated()
    assert Accelerator(cpu=True, mixed_precision="bf16").mixed_precision == "bf16"
    AcceleratorState._reset_state()


def test_calls_at_once_leave_the_state_to_the_last():
    AcceleratorState._reset_state()
    inside, out = threading.Event(), threading.Event()

    def other():
        with undisturbed():
            inside.set()
            out.wait()

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait()
    with undisturbed():
        Accelerator(cpu=True)
    assert AcceleratorState._shared_state, "the other call may need it"
    out.set()
    thread.join()
    assert not AcceleratorState._shared_state


def test_the_default_dtype_and_autocast_change_nothing(tmp_path):
    net, pair = robust_net(), patterns(12, 4, seed=7)
    expected = evaluated(net, pair)
    plain, other = tiny_config(tmp_path / "a", max_steps=2), tiny_config(tmp_path / "b", max_steps=2)
    weights = weights_digest(arrest_hub.load(finetune(plain).export).backbone)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = evaluated(net, pair)
            run = finetune(other)
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert found == expected
    assert weights_digest(arrest_hub.load(run.export).backbone) == weights


@pytest.mark.parametrize("caller", [contextlib.nullcontext, partial(torch.autocast, "cpu", torch.bfloat16)])
def test_passes_in_half_precision_follow_the_weights(caller):
    """Autocast keeps the weights it has rounded until the outermost of its contexts ends."""
    net, x = torch.nn.Linear(4, 4, bias=False), torch.ones(1, 4)
    with caller():
        net(x)  # in the caller's own autocast, rounded and kept
        with undisturbed():
            accelerator = Accelerator(cpu=True, mixed_precision="bf16")
            assert not torch.is_autocast_enabled("cpu")
            for value in (1.0, 2.0, 3.0):
                with torch.no_grad():
                    net.weight.fill_(value)
                with accelerator.autocast():
                    output = net(x)
                assert output.dtype == torch.bfloat16
                assert output.tolist() == [[4 * value] * 4]
        assert net(x).tolist() == [[12.0] * 4]
        assert torch.is_autocast_enabled("cpu") == (caller is not contextlib.nullcontext)
    assert torch.is_autocast_cache_enabled()


def test_the_second_step_of_a_training_in_bf16_is_of_what_the_first_made(tmp_path):
    losses = {}
    for name, precision, lr in (("fp32", "no", 3.0), ("bf16", "bf16", 3.0), ("unmoved", "no", 1e-9)):
        output = str(tmp_path / name)
        finetune(tiny_config(tmp_path, mixed_precision=precision, lr=lr, max_steps=2, log_every=1, output_dir=output))
        log = (tmp_path / name / "log.jsonl").read_text().splitlines()
        losses[name] = [line["loss"] for line in map(json.loads, log) if "loss" in line]
    assert losses["fp32"][0] == losses["unmoved"][0] == pytest.approx(losses["bf16"][0], rel=0.05)
    moved = abs(losses["fp32"][1] - losses["unmoved"][1])
    assert moved > 1
    assert losses["bf16"][1] == pytest.approx(losses["fp32"][1], abs=0.2 * moved)
