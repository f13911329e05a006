import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from torch.utils.data import DataLoader, Dataset, get_worker_info

from arrest_hub import stopping
from arrest_hub.stopping import outlive_termination, watch_for_termination


class Pids(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        time.sleep(0.02)
        return get_worker_info().id, os.getpid()


def loader():
    return DataLoader(Pids(), num_workers=1, worker_init_fn=outlive_termination)


def test_a_loader_outlives_a_signal_from_outside():
    seen = []
    for _, pid in loader():
        seen.append(int(pid))
        # from another process than the one that the worker works for
        subprocess.run([sys.executable, "-c", f"import os; os.kill({int(pid)}, 15)"], check=True)
    assert len(seen) == 8
    assert len(set(seen)) == 1


def test_a_loader_obeys_its_own_process():
    batches = iter(loader())
    _, pid = next(batches)
    (worker,) = batches._workers
    os.kill(int(pid), signal.SIGTERM)
    worker.join(5)
    assert worker.exitcode == 0
    batches._workers_status[0] = False  # torch need not be told


def test_a_loader_that_is_asked_from_outside_ends_later(monkeypatch):
    monkeypatch.setattr(stopping, "WORKER_SECONDS", 0.5)
    batches = iter(loader())
    _, pid = next(batches)
    (worker,) = batches._workers
    batches._workers_status[0] = False
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", f"import os; os.kill({int(pid)}, 15)"], check=True)
    with suppress(RuntimeError):  # torch's handler tells it, sometimes while it is waited for
        worker.join(5)
    worker.join(5)
    assert worker.exitcode == 1
    assert time.monotonic() - began >= 0.5


def test_a_loader_leaves_ctrl_c_to_the_one_it_works_for():
    seen = []
    for _, pid in loader():
        seen.append(int(pid))
        os.kill(int(pid), signal.SIGINT)
    assert len(seen) == 8
    assert len(set(seen)) == 1


def test_the_second_ctrl_c_does_not_wait(capfd, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    with watch_for_termination() as termination:
        os.kill(os.getpid(), signal.SIGINT)
        assert (termination.asked, termination.exit_code) == (True, 130)
        assert "stopping after this step" in capfd.readouterr().err
        os.kill(os.getpid(), signal.SIGINT)  # a launcher passing the first one on
        monkeypatch.setattr(stopping, "SAME_SECONDS", -1.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_ctrl_c_is_noted_where_nobody_reads(monkeypatch):
    def write(*_):
        raise BrokenPipeError

    monkeypatch.setattr(stopping.os, "write", write)
    with watch_for_termination() as termination:
        os.kill(os.getpid(), signal.SIGINT)
        assert termination.asked


def test_the_run_takes_note_and_gives_the_signal_back():
    before = signal.getsignal(signal.SIGTERM)
    with watch_for_termination() as termination:
        assert not termination.asked
        os.kill(os.getpid(), signal.SIGTERM)
        assert termination.asked
    assert signal.getsignal(signal.SIGTERM) == before
