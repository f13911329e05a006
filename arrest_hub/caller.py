"""What a call must not take from its caller's process, nor change in it: notebooks call, and go on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Generic, TypeVar, cast
from weakref import WeakKeyDictionary, ref

import torch
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils.operations import ConvertOutputsToFp32
from torch import nn

from arrest_hub.seeding import random_states_kept

T = TypeVar("T")


class _Shared(Generic[T]):
    """Something that is the process's, not the thread's.

    ``begin`` changes it and gives what it was, ``end`` puts that back: for the first and the last of several calls at
    once (in threads, or one within another).
    """

    def __init__(self, begin: Callable[[], T], end: Callable[[T], None]) -> None:
        self.begin, self.end = begin, end
        self.lock = threading.Lock()
        self.calls = 0
        self.kept: T | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        with self.lock:
            if self.calls == 0:
                self.kept = self.begin()
            self.calls += 1
        try:
            yield
        finally:
            with self.lock:
                self.calls -= 1
                if self.calls == 0:
                    self.end(cast(T, self.kept))
                    self.kept = None


def _float32_by_default() -> torch.dtype:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    return before


def _put_states_back(states: list[dict[str, Any]]) -> None:
    for shared, before in zip((AcceleratorState, GradientState), states, strict=True):
        shared._shared_state.clear()  # the same object: the caller's Accelerators look into it
        shared._shared_state.update(before)


_DTYPE = _Shared(_float32_by_default, torch.set_default_dtype)
# what all Accelerators of the process share
_STATES = _Shared(lambda: [dict(state._shared_state) for state in (AcceleratorState, GradientState)], _put_states_back)
_FORWARD: WeakKeyDictionary[nn.Module, _Shared[Any]] = WeakKeyDictionary()
_FORWARD_LOCK = threading.Lock()


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
    """Networks that Accelerate has prepared for mixed precision run their own forward within, without its autocast.

    A forward that somebody else has put in its place, or around it, stays.
    """
    with ExitStack() as stack:
        for module in (module for network in networks for module in network.modules()):
            if "_original_forward" in module.__dict__:
                with _FORWARD_LOCK:
                    shared = _FORWARD.setdefault(module, _unprepared(module))
                stack.enter_context(shared.held())
        yield


def _unprepared(module: nn.Module) -> _Shared[Any]:
    """Accelerate's forward taken away, and put back."""
    found = ref(module)  # or the dictionary's value would keep its key

    def begin() -> Any:
        attributes = cast(nn.Module, found()).__dict__
        forward = attributes.get("forward")
        if not isinstance(getattr(forward, "__wrapped__", None), ConvertOutputsToFp32):
            return None
        attributes["forward"] = attributes["_original_forward"]
        return forward

    def end(forward: Any) -> None:
        if forward is not None:
            cast(nn.Module, found()).__dict__["forward"] = forward

    return _Shared(begin, end)


@contextmanager
def on_cpu_unless_told() -> Iterator[None]:
    """Tensors that are made without a device are on the CPU, whatever ``torch.set_default_device`` said."""
    with nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"):
        yield


@contextmanager
def as_by_default() -> Iterator[None]:
    """Networks made within are of float32, on the CPU and trainable, whatever the caller has set."""
    with torch.inference_mode(False), torch.enable_grad(), on_cpu_unless_told(), _DTYPE.held():
        yield


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
        stack.enter_context(_DTYPE.held())
        stack.enter_context(_STATES.held())
        yield
