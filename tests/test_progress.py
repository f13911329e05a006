import json
import os

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from arrest_hub.progress import Log, Meter


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def test_meter_averages_over_samples_not_batches(accelerator):
    meter = Meter()
    drift = [np.random.default_rng(0).random(8).astype("f4"), np.random.default_rng(1).random(4).astype("f4")]
    for step, values in enumerate(drift):
        parts = {
            "drift": torch.from_numpy(values), "replayed": torch.from_numpy((values > 0.5).astype("f4")),
            "zero_gradient_share": torch.full((len(values),), 0.5), "loss": torch.tensor(2.0, requires_grad=True),
        }  # fmt: skip
        meter.add(parts, step, torch.arange(len(values)))
    assert meter.first_not_finite() is None
    together = np.concatenate(drift)
    result = meter.reduce(accelerator)
    assert result["drift"] == pytest.approx(together.mean(), rel=1e-6)
    assert result["drift_p50"] == pytest.approx(np.quantile(together, 0.5), rel=1e-6)
    assert result["drift_p90"] == pytest.approx(np.quantile(together, 0.9), rel=1e-6)
    assert result["drift_max"] == pytest.approx(together.max())
    assert result["replay_rate"] == pytest.approx((together > 0.5).mean())
    assert result["zero_gradient_share"] == 0.5
    assert result["loss"] == 2
    assert not meter.values
    assert not meter.steps
    assert not meter.indices


def test_what_is_not_finite_becomes_null(accelerator, tmp_path):
    log = Log(tmp_path / "log.jsonl", accelerator)
    log.write({"phase": "robust", "step": 1, "grad_norm": float("inf")}, 1)
    assert json.loads(log.path.read_text(), parse_constant=pytest.fail)["grad_norm"] is None


def test_rewind_drops_what_came_after_the_checkpoint(accelerator, tmp_path):
    log = Log(tmp_path / "log.jsonl", accelerator)
    for phase, step in [("standard", 2), ("standard", 4), ("robust", 2), ("robust", 4)]:
        log.write({"phase": phase, "step": step, "epoch": 0, "loss": 1 / 3}, step)
    with log.path.open("a") as file:
        file.write('{"phase": "robust", "st')  # the line being written when the run was killed
    log.rewind("robust", 2)

    def steps():
        lines = [json.loads(line) for line in log.path.read_text().splitlines()]
        return [(line["phase"], line["step"]) for line in lines]

    assert steps() == [("standard", 2), ("standard", 4), ("robust", 2)]
    log.rewind("standard", 2)
    assert steps() == [("standard", 2)]


def test_a_log_that_is_rewound_is_whole_at_every_moment(accelerator, tmp_path, monkeypatch):
    log = Log(tmp_path / "log.jsonl", accelerator)
    for step in (1, 2, 3):
        log.write({"phase": "robust", "step": step, "epoch": 0}, step)
    before = log.path.read_bytes()

    def full(descriptor):
        os.truncate(descriptor, 0)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        log.rewind("robust", 2)
    assert log.path.read_bytes() == before
