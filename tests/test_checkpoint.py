import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from arrest_hub import checkpoint
from arrest_hub.checkpoint import (
    Progress,
    checkpoint_name,
    list_checkpoints,
    load_checkpoint,
    newest_whole,
    put_back_replaced,
    read_progress,
    remove_leftovers,
    save_checkpoint,
)
from arrest_hub.seeding import derive_seed


def test_names():
    assert checkpoint_name("robust", 500) == "step-000500"
    assert checkpoint_name("standard", 7) == "standard-000007"


def test_only_whole_checkpoints_are_found_in_order(tmp_path):
    for name in ("step-000002", "step-000010", "step-000010.tmp", "step-999999", "standard-000004", "best"):
        (tmp_path / name).mkdir()
        if name != "step-999999":  # cut short before its manifest was written
            (tmp_path / name / "progress.json").write_text(json.dumps(dataclasses.asdict(Progress("robust"))))
            (tmp_path / name / "manifest.json").write_text("{}")
    assert [path.name for path in list_checkpoints(tmp_path, "robust")] == ["step-000002", "step-000010"]
    assert [path.name for path in list_checkpoints(tmp_path, "standard")] == ["standard-000004"]
    assert list_checkpoints(tmp_path / "nowhere", "robust") == []


def test_save_and_load_and_keep(tmp_path):
    accelerator = Accelerator(cpu=True)
    accelerator.free_memory()
    model, ema = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model, optimizer = accelerator.prepare(model, optimizer)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    stale = tmp_path / "step-000003.tmp"
    stale.mkdir()
    (stale / "rubbish").touch()
    for step in (1, 2, 3):
        progress = Progress("robust", step=step, epoch=1, batch=2, best_score=0.5, best_step=1)
        path = save_checkpoint(accelerator, tmp_path, progress, ema, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000003"]
    assert not (path / "rubbish").exists()
    before = [parameter.detach().clone() for parameter in (*model.parameters(), *ema.parameters())]
    momentum = optimizer.state_dict()["state"][0]["momentum_buffer"].clone()
    with torch.no_grad():
        for parameter in (*model.parameters(), *ema.parameters()):
            parameter.zero_()
    assert load_checkpoint(accelerator, path, ema) == progress == read_progress(path)
    after = [*model.parameters(), *ema.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(optimizer.state_dict()["state"][0]["momentum_buffer"], momentum)
    accelerator.free_memory()


def test_seeds_differ_and_repeat():
    seeds = {
        derive_seed(s, p, e, b, r)
        for s in range(3)
        for p in ("a", "b")
        for e in range(3)
        for b in range(20)
        for r in (0, 1)
    }
    assert len(seeds) == 3 * 2 * 3 * 20 * 2
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "x", 1) == derive_seed(0, "x", 1)
    assert derive_seed(1, 11) != derive_seed(11, 1)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", ["before the new one has its name", "before the old one is gone"])
def test_a_checkpoint_that_is_replaced_is_never_lost(moment, tmp_path, monkeypatch):
    """As where a validation was cut short, and the resumed run validates and saves the same step again."""
    accelerator = Accelerator(cpu=True)
    save_checkpoint(accelerator, tmp_path, Progress("robust", step=5, to_validate=True), None, 1)

    def killed(self, *args, **kwargs):
        if moment.startswith("before the new") == self.name.endswith(".tmp"):
            raise Killed
        return rename(self, *args, **kwargs)

    rename, remove = Path.rename, shutil.rmtree
    if moment.startswith("before the new"):
        monkeypatch.setattr(Path, "rename", killed)
    else:
        monkeypatch.setattr(
            checkpoint.shutil,
            "rmtree",
            lambda path, **rest: remove(path, **rest) if path.suffix == ".tmp" else killed(path),
        )
    with pytest.raises(Killed):
        save_checkpoint(accelerator, tmp_path, Progress("robust", step=5, to_validate=False), None, 1)
    monkeypatch.undo()
    put_back_replaced(tmp_path)
    remove_leftovers(tmp_path, "*.tmp")
    (left,) = tmp_path.iterdir()
    found, passed_over = newest_whole(accelerator, tmp_path, "robust")
    assert (found, passed_over) == (left, [])
    assert read_progress(left).to_validate == moment.startswith("before the new")
