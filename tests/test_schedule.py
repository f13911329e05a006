"""How long a run is, and what goes by it: the learning rate, warm-up, the start of averaging, a tracker's steps."""

import pytest
import torch
from test_train import log_lines
from timm.utils import ModelEmaV3
from tiny import killed_after, tiny_config

from arrest_hub import prepare
from arrest_hub.checkpoint import list_checkpoints, read_progress
from arrest_hub.config import FinetuneConfig
from arrest_hub.errors import ConfigError
from arrest_hub.progress import Log
from arrest_hub.schedule import Schedule, length_problems
from arrest_hub.step import make_optimizer
from arrest_hub.train import finetune


def rates(total, epoch_steps=None, **changes):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    config = FinetuneConfig(model="m", dataset="d", **changes)
    schedule = Schedule(config, optimizer, total, epoch_steps, robust=True)
    found = []
    for place in range(total):
        schedule.set_learning_rate(place)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def reference(total, make):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    scheduler = make(optimizer)
    found = []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("poly", lambda optimizer: torch.optim.lr_scheduler.PolynomialLR(optimizer, 20)),
        ("cosine", lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)),
        ("multistep", lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [10, 15])),
        ("step", lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 6)),
        ("constant", lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
    ],
)
def test_schedules_are_those_of_pytorch(name, make):
    assert rates(20, scheduler=name) == pytest.approx(reference(20, make))


def test_warm_up_then_held():
    plain = rates(20, 8, warmup_epochs=0.5)
    assert plain[:5] == pytest.approx([0, 0.025, 0.05, 0.075, plain[4]])
    held = rates(20, 8, warmup_epochs=0.5, lr_hold=0.6)
    assert held[:4] == plain[:4]
    assert held[4:] == pytest.approx([max(0.06, rate) for rate in plain[4:]])


def test_what_does_not_fit_the_number_of_images():
    def problems(images, processes=2, **changes):
        return length_problems(FinetuneConfig(model="m", dataset="d", **changes), images, processes)

    found = problems(None, 1, standard_epochs=1, warmup_epochs=0.5, ema_decay=0.9, ema_start_epoch=1)
    assert [problem.split(":")[0] for problem in found] == [
        "--streaming", "--streaming", "--warmup-epochs 0.5", "--ema-start-epoch 1"
    ]  # fmt: skip
    assert problems(None, 1, max_steps=5) == []
    (problem,) = problems(None, max_steps=5)
    assert "2 processes cannot agree on the length of an epoch. Give --limit-train N" in problem
    late = {"batch_size": 8, "grad_accum_steps": 2, "ema_decay": 0.9, "ema_start_epoch": 2}
    assert problems(100, max_steps=7, **late) == [], "an epoch has 3 steps"
    (problem,) = problems(100, max_steps=6, **late)
    assert "is step 6, and the training ends at --max-steps 6" in problem
    assert problems(100, **late) == []
    assert problems(100, max_steps=6, resume=True, **late) == [], "it goes on as it began"
    assert problems(None, 1, max_steps=6, resume=True, warmup_epochs=0.5) == []


def unknown_length(monkeypatch):
    plain = prepare.load_splits

    def load(*arguments, **options):
        splits = plain(*arguments, **options)
        splits.train.num_examples = None
        return splits

    monkeypatch.setattr(prepare, "load_splits", load)


def test_epochs_of_unknown_length_are_refused_before_the_run(tmp_path, monkeypatch):
    unknown_length(monkeypatch)
    with pytest.raises(ConfigError, match="--warmup-epochs 2: the length of the stream"):
        finetune(tiny_config(tmp_path, streaming=True, max_steps=2, warmup_epochs=2))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"grad_accum_steps": 6}, "after 4 whole batches of 8 images, and a step takes 6"),
     ({"batch_size": 64}, "after 0 whole batches of 64 images, and a step takes 1")],
)  # fmt: skip
def test_a_stream_too_short_for_a_step_ends_the_run(tmp_path, monkeypatch, changes, message):
    unknown_length(monkeypatch)
    with pytest.raises(ConfigError, match=message):
        finetune(tiny_config(tmp_path, streaming=True, max_steps=2, **changes))


def killed(tmp_path, steps, **changes):
    """A run that dies in the step after ``steps``."""
    with killed_after(steps):
        finetune(tiny_config(tmp_path, **changes))


def end_of(tmp_path):
    return read_progress(list_checkpoints(tmp_path / "run" / "checkpoints", "robust")[-1])


@pytest.mark.parametrize("max_steps", [None, 100])
def test_epochs_decide_the_length_with_other_batches_too(tmp_path, max_steps):
    """Also beside --max-steps, where that is not what ends the run."""
    changes = {"epochs": 3, "max_steps": max_steps, "eval_every": 0}
    killed(tmp_path, 5, **changes)
    finetune(tiny_config(tmp_path, resume=True, batch_size=16, **changes))
    # 36 images: four steps of 8 in the first epoch, then two of 16 in each of two
    assert (end_of(tmp_path).epoch, end_of(tmp_path).step, end_of(tmp_path).place) == (3, 8, 6)


def test_max_steps_end_a_run_whose_batches_changed_twice(tmp_path, capsys):
    changes = {"epochs": 3, "max_steps": 10, "eval_every": 0}
    killed(tmp_path, 5, **changes)  # goes on from the end of the first epoch, after four steps
    assert "ends the run" not in capsys.readouterr().out
    killed(tmp_path, 3, resume=True, batch_size=16, **changes)  # two steps an epoch: epochs decide
    assert "--epochs 3 ends the run, not --max-steps 10: the learning rate is" in capsys.readouterr().out
    finetune(tiny_config(tmp_path, resume=True, batch_size=8, **changes))
    assert "--max-steps 10 ends the run, not --epochs 3: the learning rate is" in capsys.readouterr().out
    assert end_of(tmp_path).step == end_of(tmp_path).place == 10


def test_with_other_batches_warm_up_and_averaging_stay_at_their_steps(tmp_path, monkeypatch):
    """Where --max-steps ends the run: the average is not begun again, nor does the learning rate rise again."""
    decays, plain = {}, ModelEmaV3.get_decay

    def watched(self, step=None):
        decays[step] = plain(self, step)
        return decays[step]

    monkeypatch.setattr(ModelEmaV3, "get_decay", watched)
    changes = {"epochs": 3, "max_steps": 11, "ema_decay": 0.9, "ema_start_epoch": 0.75, "warmup_epochs": 0.75,
               "log_every": 1, "eval_every": 0}  # fmt: skip
    killed(tmp_path, 5, **changes)
    finetune(tiny_config(tmp_path, resume=True, batch_size=4, **changes))
    assert [decays[step] for step in range(1, 12)] == [0.0] * 3 + [0.9] * 8
    rates = [line["lr"] for line in log_lines(tmp_path / "run") if "loss" in line]
    assert len(rates) == 11
    assert rates[:4] == sorted(rates[:4])
    assert rates[3:] == sorted(rates[3:], reverse=True)


def test_a_trackers_steps_go_on_after_a_resumption(tmp_path, monkeypatch):
    steps, plain = [], Log.write

    def write(self, line, images):
        steps.append(images)
        plain(self, line, images)

    monkeypatch.setattr(Log, "write", write)
    changes = {"checkpoint_every": 1, "log_every": 2, "eval_every": 0}
    killed(tmp_path, 5, **changes)
    assert steps == [16, 32]
    finetune(tiny_config(tmp_path, resume=True, **changes))
    assert steps == [16, 32, 48, 64], "of eight images each, the one between two lines too"


def test_the_learning_rate_is_held_in_the_robust_phase_alone(tmp_path):
    config = tiny_config(tmp_path, lr_hold=0.5)
    found = {}
    for robust in (False, True):
        optimizer = make_optimizer(config, torch.nn.Linear(2, 2), 0.1)
        Schedule(config, optimizer, 10, None, robust=robust).set_learning_rate(9)
        found[robust] = optimizer.param_groups[0]["lr"]
    assert found[False] < 0.05 <= found[True]
