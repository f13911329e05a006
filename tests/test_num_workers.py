"""Loader processes by default: the cores of a node are shared by that node's processes alone."""

import os
from types import SimpleNamespace

import pytest

from arrest_hub.prepare import num_workers


@pytest.mark.parametrize(
    ("cores", "processes", "on_this_node", "expected"),
    [(64, 8, "8", 7), (64, 64, "8", 7), (16, 4, None, 3), (2, 4, None, 0), (64, 1, None, 8)],
)
def test_cores_are_shared_by_the_processes_of_a_node(monkeypatch, cores, processes, on_this_node, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if on_this_node is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", on_this_node)
    accelerator = SimpleNamespace(num_processes=processes)
    assert num_workers(None, accelerator) == expected
    assert num_workers(5, accelerator) == 5
