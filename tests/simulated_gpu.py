"""A GPU that is not there. Within `simulated_gpu` a tensor moved to cuda:0 says that it is there, is computed on the
CPU to the same bits, and like a real one refuses to be mixed with tensors, or drawn by generators, that are elsewhere.

Its memory is what its tensors take, and may be full. What it cannot show: kernels and their workspaces, speed, several
GPUs, anything in threads of their own (workers that load images).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from functools import cache
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
NAME = "NVIDIA H200"
aten = torch.ops.aten
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._unsafe_index.Tensor}
COPIES = {aten.copy_.default, aten._to_copy.default, aten.set_.source_Tensor}
FROM_C = {aten._to_copy.default, aten.new_empty_strided.default}
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.masked_select.default,
         aten.is_nonzero.default}  # fmt: skip
RealGenerator = torch.Generator


class Mixed(RuntimeError):
    """What a real GPU refuses."""


class Memory:
    """Bytes of the storages that are held, and how many there were at most; ``limit``: how many there may be."""

    def __init__(self):
        self.gpu = 0
        self.renew(10**10)

    def renew(self, limit):
        """Another GPU, on which nothing is: what is left of the one before is not on it."""
        self.gpu += 1
        self.held: dict[int, list[int]] = {}
        self.used = self.peak = 0
        self.limit = limit

    def take(self, address, size):
        count = self.held.setdefault(address, [0, size])
        if not count[0]:
            if self.used + size > self.limit:
                del self.held[address]
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes.")
            self.used += size
            self.peak = max(self.peak, self.used)
        count[0] += 1

    def give_back(self, address):
        count = self.held.get(address)
        if count is not None:
            count[0] -= 1
            if not count[0]:
                self.used -= self.held.pop(address)[1]

    def forget_peak(self, *_):
        self.peak = self.used


memory = Memory()


class Lease:
    """Of a storage, for as long as a tensor lives: a reference in the tensor, which may be swapped with another."""

    def __init__(self, storage):
        self.gpu, self.address = memory.gpu, storage.data_ptr()
        memory.take(self.address, storage.nbytes())

    def __del__(self):
        if self.gpu == memory.gpu:
            memory.give_back(self.address)


class OnGpu(torch.Tensor):
    """A tensor that says it is on the GPU; ``held``, on the CPU, has its numbers. To C++ it is on the CPU."""

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=CPU,
        )  # fmt: skip

    def __init__(self, held):
        self.held = held
        self.lease = Lease(held.untyped_storage())

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})

    def __tensor_flatten__(self):
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return OnGpu(inner["held"])

    def tolist(self):
        return self.held.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def data_ptr(self):
        return self.held.data_ptr()

    def untyped_storage(self):
        return self.held.untyped_storage()

    def __repr__(self):
        return f"OnGpu({self.held!r})"

    def __format__(self, spec):
        return format(self.held, spec)

    def __reduce_ex__(self, protocol):
        return self.held.detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copy = OnGpu(self.held.detach().clone())
            parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(copy, self.requires_grad) if parameter else copy
        return memo[id(self)]


waited: list[str] = []
"""What the CPU waited for the GPU for, since somebody cleared it."""
_moving: list[bool] = []
"""Of each copy under way, whether it is one that nobody waits for."""


def computed(func, args, kwargs):
    """An operation of ATen, where its tensors are or are to be."""
    made_in_c = {aten.index_put.default: 2, aten.scatter.src: 3}.get(func)
    if made_in_c and not isinstance(args[0], OnGpu) and isinstance(args[made_in_c], OnGpu):
        args = (OnGpu(args[0]), *args[1:])  # zeros that the backward pass of an indexing or a sorting made
    leaves = [*_leaves(args), *kwargs.values()]
    there = [x for x in leaves if isinstance(x, OnGpu)]
    if not there and not kwargs:
        return func(*args)
    device = kwargs.get("device")
    on_gpu = bool(there) if device is None else torch.device(device).type == "cuda"
    if func in FROM_C and there and not _moving:
        on_gpu = True  # from C++, which wants it where it takes it to be
    if func is aten.copy_.default:
        on_gpu = isinstance(args[0], OnGpu)
    _check(func, args, leaves, there)
    blocking = func is aten._to_copy.default and not on_gpu and not (_moving and _moving[-1])
    if (there and (func in WAITS or blocking)) or _boolean_index(func, args):
        waited.append(str(func))
    inner_args = _each(args, lambda x: x.held if isinstance(x, OnGpu) else x)
    inner_kwargs = {name: value.held if isinstance(value, OnGpu) else value for name, value in kwargs.items()}
    inner_kwargs |= {} if device is None else {"device": CPU}
    inner_kwargs.pop("pin_memory", None)
    found = func(*inner_args, **inner_kwargs)
    if not on_gpu:
        return found
    found = _each(found, lambda x: OnGpu(x) if isinstance(x, torch.Tensor) and not isinstance(x, OnGpu) else x)
    return return_and_correct_aliasing(func, args, kwargs, found) if there and _aliases(func) else found


def _leaves(value):
    """What a tuple or list, of operands or of tuples and lists of them, holds."""
    for one in value:
        if isinstance(one, (tuple, list)):
            yield from _leaves(one)
        else:
            yield one


def _each(value, change):
    """``change`` of an operand or a result, or of each in a tuple or list."""
    if type(value) is tuple or type(value) is list:
        return type(value)(_each(one, change) for one in value)
    return change(value)


@cache
def _aliases(func):
    """Whether an operation gives back, or a view of, one of its arguments."""
    return any(one.alias_info is not None for one in (*func._schema.arguments, *func._schema.returns))


def _check(func, args, leaves, there):
    if not there or func in COPIES:
        return
    elsewhere = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, OnGpu)]
    if func in INDEXING:  # by indices that are on the CPU a GPU's tensor may be indexed, not the other way round
        value = args[2:3] if func is not aten.index.Tensor else ()
        elsewhere = [x for x in (args[0], *value) if isinstance(x, torch.Tensor) and not isinstance(x, OnGpu)]
    if any(x.dim() > 0 for x in elsewhere):
        raise Mixed(f"Expected all tensors to be on the same device, cuda:0 and cpu: {func}")


def _boolean_index(func, args):
    if func not in INDEXING or not isinstance(args[0], OnGpu):
        return False
    return any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in args[1])


def moved(tensor, *args, copy=False, **kwargs):
    """Tensor.to"""
    other = kwargs.pop("other", args[0] if args and isinstance(args[0], torch.Tensor) else None)
    if other is not None:
        return moved(tensor, other.device, other.dtype, *args[1:], copy=copy, **kwargs)
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    device = tensor.device if device is None else device
    dtype = tensor.dtype if dtype is None else dtype
    same = device.type == tensor.device.type and dtype == tensor.dtype
    if same and not copy and (memory_format is None or tensor.is_contiguous(memory_format=memory_format)):
        return tensor
    if device.type == "cuda" != tensor.device.type and not non_blocking:
        waited.append("copy to the GPU")
    options = {} if memory_format is None else {"memory_format": memory_format}
    _moving.append(non_blocking)
    try:
        return aten._to_copy(tensor, device=GPU if device.type == "cuda" else device, dtype=dtype, **options)
    finally:
        _moving.pop()


class Dispatched(TorchDispatchMode):
    """What makes new tensors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


class Called(TorchFunctionMode):
    """What C++ decides by the device before it dispatches."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        first = args[0] if args else None
        if func is torch.Tensor.cpu:
            return moved(first, "cpu")
        if func is torch.Tensor.to:
            return moved(*args, **kwargs)
        if func is torch.Tensor.pin_memory:
            return first
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or CPU).type == "cuda":
            return moved(func(*args, **(kwargs | {"device": CPU})), GPU)
        if isinstance(first, OnGpu) and func in (torch.quantile, torch.Tensor.new_tensor):
            return moved(func(first.held, *args[1:], **kwargs), GPU)
        if (generator := kwargs.get("generator")) is not None:
            tensors = (x.device for x in args if isinstance(x, torch.Tensor))
            device = torch.device(kwargs.get("device") or next(tensors, CPU))
            if isinstance(generator, GpuGenerator) != (device.type == "cuda"):
                raise Mixed(f"Expected a generator of {device}: {func}")
        return func(*args, **kwargs)


class GpuGenerator(RealGenerator):
    """A generator of the GPU's, which draws as the CPU's does."""

    device = property(lambda self: GPU)


class _AnyGenerator(type):
    def __instancecheck__(cls, instance):
        return isinstance(instance, RealGenerator)


class Generator(metaclass=_AnyGenerator):
    """In place of torch.Generator."""

    def __new__(cls, device="cpu"):
        return GpuGenerator() if torch.device(device).type == "cuda" else RealGenerator(device)


class Event:
    """In place of torch.cuda.Event."""

    def __init__(self, enable_timing=False):
        self.at = 0.0

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        """Waits for what was given to the GPU before, and for nothing since."""

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


def nothing(*args, **kwargs):
    """In place of what has no meaning without a GPU."""


def _autocast(self, device_type, *args, _plain=torch.autocast.__init__, **kwargs):
    _plain(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)


def _apply(self, fn, recurse=True, _plain=torch.nn.Module._apply):
    """Leaves a module alone whose tensors are all as they are to be: swapping wants that nothing else looks at them."""
    with torch.no_grad():
        same = all(fn(tensor) is tensor for tensor in (*self.parameters(), *self.buffers()))
    return self if same else _plain(self, fn, recurse)


@contextlib.contextmanager
def simulated_gpu(limit: int = 10**10) -> Iterator[None]:
    """Within this context there is a GPU of ``limit`` bytes, an Accelerator takes it, and autocast rounds what it is
    given."""
    answers = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0, "get_device_name": NAME,
        "memory_reserved": 0,
        "is_bf16_supported": True, "get_device_capability": (9, 0),
    }  # fmt: skip
    silent = ("set_device", "synchronize", "empty_cache", "_lazy_init", "_lazy_call",
              "manual_seed", "manual_seed_all", "set_rng_state", "set_rng_state_all")  # fmt: skip
    memory.renew(limit)
    states = (PartialState, AcceleratorState, GradientState)
    before = [dict(state._shared_state) for state in states]
    for state in states:
        state._shared_state.clear()
    try:
        with contextlib.ExitStack() as stack:
            patches = [patch.object(torch.cuda, name, lambda *_, value=value, **__: value)
                       for name, value in answers.items()]  # fmt: skip
            patches += [patch.object(torch.cuda, name, nothing) for name in silent]
            patches += [
                patch.object(torch.accelerator, "is_available", lambda: True),
                patch.object(torch.accelerator, "current_accelerator", lambda *_, **__: torch.device("cuda")),
                patch.object(torch.cuda, "Event", Event),
                patch.object(torch.cuda, "mem_get_info", lambda *_: (memory.limit - memory.used, memory.limit)),
                patch.object(torch.cuda, "max_memory_allocated", lambda *_: memory.peak),
                patch.object(torch.cuda, "reset_peak_memory_stats", memory.forget_peak),
                patch.object(torch.cuda, "get_rng_state", lambda *_: torch.get_rng_state()),
                patch.object(torch.cuda, "get_rng_state_all", lambda: [torch.get_rng_state()]),
                patch.object(torch.cuda.random, "_lazy_call", nothing),
                patch.object(torch, "Generator", Generator),
                patch.object(torch.autocast, "__init__", _autocast),
                patch.object(torch.__future__, "_swap_module_params_on_conversion", True),
                patch.object(torch.nn.Module, "_apply", _apply),
                patch.object(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", nothing),
            ]
            for entered in (*patches, Dispatched(), Called()):
                stack.enter_context(entered)
            yield
    finally:
        for state, was in zip(states, before, strict=True):
            state._shared_state.clear()
            state._shared_state.update(was)
