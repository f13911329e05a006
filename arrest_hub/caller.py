"""What a call must not take from its caller's process, nor change in it: notebooks call, and go on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from arrest_hub.seeding import random_states_kept


class _SharedState:
    """What is the process's, not the thread's: the states that all Accelerators share, the default dtype.

    The first of several calls at once (in threads, or one within another) keeps it, the last one puts it back.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.calls = 0
        self.kept: tuple[list[dict[str, Any]], torch.dtype] = ([], torch.float32)

    def enter(self) -> None:
        with self.lock:
            if self.calls == 0:
                states = [dict(state._shared_state) for state in (AcceleratorState, GradientState)]
                self.kept = states, torch.get_default_dtype()
                torch.set_default_dtype(torch.float32)
            self.calls += 1

    def leave(self) -> None:
        with self.lock:
            self.calls -= 1
            if self.calls == 0:
                states, dtype = self.kept
                for shared, before in zip((AcceleratorState, GradientState), states, strict=True):
                    shared._shared_state.clear()  # the same object: the caller's Accelerators look into it
                    shared._shared_state.update(before)
                torch.set_default_dtype(dtype)


_SHARED = _SharedState()


@contextmanager
def _autocast_off() -> Iterator[None]:
    """Autocast is off and keeps no rounded weights, in every pass within.

    Not by ``torch.autocast(enabled=False)``: whatever autocast is entered within another one, the caller's too, keeps
    the weights that it has rounded until the outermost one ends, so that each pass of a training would have those of
    the first.
    """
    devices = {"cpu"}
    if (accelerator := torch.accelerator.current_accelerator()) is not None:
        devices.add(accelerator.type)
    caching = torch.is_autocast_cache_enabled()
    enabled = {device: torch.is_autocast_enabled(device) for device in devices}
    torch.clear_autocast_cache()
    try:
        torch.set_autocast_cache_enabled(False)
        for device in devices:
            torch.set_autocast_enabled(device, False)
        yield
    finally:
        torch.set_autocast_cache_enabled(caching)
        for device, was in enabled.items():
            torch.set_autocast_enabled(device, was)


@contextmanager
def own_forward(*networks: nn.Module) -> Iterator[None]:
    """Networks that Accelerate has prepared for mixed precision run their own forward within, without its autocast."""
    prepared = [
        module.__dict__ for network in networks for module in network.modules()
        if {"forward", "_original_forward"} <= module.__dict__.keys()
    ]  # fmt: skip
    wrapped = [attributes["forward"] for attributes in prepared]
    try:
        for attributes in prepared:
            attributes["forward"] = attributes["_original_forward"]
        yield
    finally:
        for attributes, forward in zip(prepared, wrapped, strict=True):
            attributes["forward"] = forward


@contextmanager
def on_cpu_unless_told() -> Iterator[None]:
    """Tensors that are made without a device are on the CPU, whatever ``torch.set_default_device`` said."""
    with nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"):
        yield


@contextmanager
def as_by_default() -> Iterator[None]:
    """Networks made within are of float32, on the CPU and trainable, whatever the caller has set."""
    dtype = torch.get_default_dtype()
    with torch.inference_mode(False), torch.enable_grad(), on_cpu_unless_told():
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Work as in a process of one's own, whatever the caller has set, and leave all of it as it was.

    Gradients are on, autocast is off, the default dtype is float32 and the default device the CPU within; afterwards
    the random states of Python, numpy and torch, the default dtype and the caller's own Accelerator are what they were
    before. Calls may overlap, in threads, whose draws then mix, and which wait for each other in what they measure; an
    Accelerator that the caller makes meanwhile shares their state, which ends with the last of them.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(on_cpu_unless_told())
        stack.enter_context(_autocast_off())
        stack.enter_context(random_states_kept())
        _SHARED.enter()
        stack.callback(_SHARED.leave)
        yield
