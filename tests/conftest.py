"""No test reaches the network: the Hub's clients are told so before they are imported."""

import gc
import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # figures and warnings are compared with those of a CPU
# the tests run side by side, and their tensors are tiny
os.environ.setdefault("OMP_NUM_THREADS", "1")


LONGEST = ("hub_push", "train", "network_options", "hub_loading", "resume", "distributed", "evaluation", "reproduce")
"""Files whose tests take longest, those first, so that no process ends long before the other."""


def pytest_collection_modifyitems(items):
    """The longest first; the rest stay in their order."""
    names = [f"test_{name}.py" for name in LONGEST]
    items.sort(key=lambda item: names.index(item.path.name) if item.path.name in names else len(names))


def pytest_collection_finish():
    """What the imported libraries hold stays as it is: collecting garbage, as every run does, need not look at it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_sleep_of_datasets(monkeypatch):
    """`datasets` sleeps for five seconds when a stream is not read to its end."""
    import datasets

    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of `datasets` of its own for the test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def few_queries(monkeypatch):
    """Square with 100 queries instead of 5,000, in the package itself, so in direct calls and in ours."""
    from pyautoattack import AutoAttack

    original = AutoAttack._set_version

    def set_version(self, version="standard"):
        original(self, version)
        self.square.n_queries = 100

    monkeypatch.setattr(AutoAttack, "_set_version", set_version)


@pytest.fixture
def few_iterations(request, monkeypatch):
    """APGD and FAB with 20 iterations instead of 100, where what is done with their examples is looked at, not what
    they are; not in a slow test, which may compare them with those of another process."""
    if request.node.get_closest_marker("slow"):
        return
    from pyautoattack import AutoAttack

    original = AutoAttack._set_version

    def set_version(self, version="standard"):
        original(self, version)
        self.apgd.n_iter = self.apgd_targeted.n_iter = self.fab.n_iter = 20

    monkeypatch.setattr(AutoAttack, "_set_version", set_version)
