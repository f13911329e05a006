"""Random draws that are a function of what they are for: (seed, epoch, image), and of nothing drawn before."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def mix(*numbers: int) -> int:
    """Numbers -> 63 well-mixed bits, the same on every machine."""
    data = struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from what identifies a draw (seed, phase, epoch, batch, rank, ...): a resumed run draws what the
    uninterrupted one draws, without any random state having been saved."""
    digest = hashlib.blake2b(" ".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Put the global random states of Python, numpy and torch (of the current GPU too, if it is in use) back."""
    python, arrays = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)


@contextmanager
def seeded(seed: int, epoch: int, index: int) -> Iterator[None]:
    """Seed torch's default CPU generator, and only that, by the image; put it back afterwards.

    torchvision's transforms draw from it. The global seeding of torch would reset the CUDA generators too.
    """
    generator = torch.default_generator
    state = generator.get_state()
    # the Mersenne twister takes 32 bits
    generator.manual_seed(mix(seed, epoch, index) & 0xFFFFFFFF)
    try:
        yield
    finally:
        generator.set_state(state)
