import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from tiny import TinyClassifier, killed_after, tiny_config

from arrest_hub import arrest, loop, step, train
from arrest_hub.checkpoint import Progress, list_checkpoints
from arrest_hub.config import FinetuneConfig
from arrest_hub.errors import ArrestError
from arrest_hub.guards import at_chance, collapse_warning, first_not_finite, not_finite_tensor
from arrest_hub.loop_guards import stop_if_all_skipped, stop_unless_finite
from arrest_hub.progress import Meter
from arrest_hub.train import finetune


def test_the_first_of_several_is_named():
    values = {
        "cross_entropy": [torch.ones(3), torch.tensor([1.0, math.nan, math.inf]), torch.full((3,), math.nan)],
        "distance": [torch.ones(3), torch.ones(3), torch.full((3,), math.nan)],
        "grad_norm": [torch.tensor([math.inf])] * 3,  # what fp16 skips a step for
    }
    indices = [torch.tensor([4, 5, 6]), torch.tensor([7, 8, 9]), torch.tensor([1, 2, 3])]
    found = first_not_finite(values, [10, 11, 12], indices)
    assert found == "the cross-entropy of samples 8, 9 (positions in the training split) is nan at step 11"
    assert first_not_finite({"loss": [torch.tensor([1.0]), torch.tensor([math.inf])]}, [1, 2], indices[:2]) == (
        "the loss is inf at step 2"
    )
    fine = {name: tensors[:1] for name, tensors in values.items()}
    assert first_not_finite(fine, [10], indices[:1]) is None
    assert first_not_finite({}, [], []) is None
    many = first_not_finite({"drift": [torch.full((20,), math.nan)]}, [1], [torch.arange(20)])
    assert "samples 0, 1, 2, 3, 4, 5, 6, 7, ... (" in many
    assert "drift of the student's representation" in many


def test_tensors():
    good = ("a", torch.ones(3)), ("count", torch.tensor(2))
    assert not_finite_tensor(good) is None
    assert not_finite_tensor((("empty", torch.zeros(0)), ("largest", torch.full((3,), 3e38)))) is None
    for bad in (math.nan, math.inf, -math.inf):
        for dtype in (torch.float16, torch.float32, torch.float64):
            named = (*good, ("counts", torch.ones(2, dtype=torch.long)), ("c", torch.tensor([1.0, bad], dtype=dtype)))
            assert not_finite_tensor(named) == "c"
    assert not_finite_tensor((*good, ("b", torch.tensor([1.0, math.inf])), ("c", torch.tensor(math.nan)))) == "b"


@pytest.mark.parametrize(
    ("correct", "n", "classes", "expected"),
    [(100, 1000, 10, True), (118, 1000, 10, True), (125, 1000, 10, False), (0, 1000, 10, True), (3, 9, 10, False),
     (0, 0, 10, False), (1500, 1_281_167, 1000, False), (1300, 1_281_167, 1000, True)],
)  # fmt: skip
def test_chance(correct, n, classes, expected):
    assert at_chance(correct, n, classes) == expected


def test_the_cause_depends_on_how_it_began():
    assert "--label-match" in collapse_warning(0.1, 0.12, 10)
    assert "--lr" in collapse_warning(0.1, 0.9, 10)
    after_clean = collapse_warning(0.1, 0.12, 10, standard_epochs=2)
    assert "(2 of --standard-epochs) was too short" in after_clean
    assert "add --standard-epochs" not in after_clean
    assert "(add --standard-epochs)" in collapse_warning(0.1, 0.12, 10)
    assert "--lr" in collapse_warning(0.1, None, 10)
    assert "--standard-lr" in collapse_warning(0.1, 0.1, 10, standard=True)
    assert "--label-match" not in collapse_warning(0.1, 0.1, 10, standard=True)


def bad_update_at(step):
    """A training step of which the ``step``-th leaves a weight that is NaN."""
    train, counted = loop.train_step, itertools.count(1)

    def bad_update(accelerator, model, *rest):
        parts = train(accelerator, model, *rest)
        if next(counted) == step:
            with torch.no_grad():
                model.head.classifiers[0].bias[0] = math.nan
        return parts

    return bad_update


def test_weights_that_are_nan_are_neither_validated_nor_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "train_step", bad_update_at(2))
    with pytest.raises(ArrestError, match="training diverged"):
        finetune(tiny_config(tmp_path, log_every=100, checkpoint_every=1000))
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))
    assert not (tmp_path / "run" / "log.jsonl").exists(), "no validation was made"


@pytest.mark.parametrize("what", ["an image", "a distance", "the weights"])
def test_a_run_stops_at_the_first_nan_and_keeps_its_checkpoints(what, tmp_path, monkeypatch):
    """Also where nothing is logged at the step, and a checkpoint is due right after it."""
    plain, count = step.to_pixels, 0

    def one_bad_image(batch):
        nonlocal count
        count += 1
        pixels = plain(batch)
        if count == 6:
            pixels[3] = math.nan
        return pixels

    real = arrest.angular_distance

    def bad_distance(u, v):
        nonlocal count
        count += 1
        return torch.where(torch.arange(len(u)) == 3, math.nan, real(u, v)) if count == 6 else real(u, v)

    if what == "the weights":
        monkeypatch.setattr(loop, "train_step", bad_update_at(6))
    elif what == "a distance":
        monkeypatch.setattr(arrest, "angular_distance", bad_distance)
    else:
        monkeypatch.setattr(step, "to_pixels", one_bad_image)
    config = tiny_config(tmp_path, checkpoint_every=1, keep_checkpoints=9, log_every=100, replay_threshold=None)
    with pytest.raises(ArrestError, match=r"at step 6|after step 6") as caught:
        finetune(config)
    message = str(caught.value)
    # through BatchNorm one bad image reaches all of its batch
    expected = {"an image": "the distance term of samples ", "a distance": "the distance term of sample ",
                "the weights": "the weights head"}[what]  # fmt: skip
    assert expected in message
    assert "--lr" in message
    kept = list_checkpoints(tmp_path / "run" / "checkpoints", "robust")
    assert [path.name for path in kept] == [f"step-{number:06d}" for number in range(1, 6)]


@pytest.mark.parametrize("threshold", [1e-6, 0.999])
def test_an_epoch_in_which_hardly_anything_is_attacked_is_told(threshold, tmp_path, capsys):
    finetune(tiny_config(tmp_path, replay_threshold=threshold, epochs=2, eval_every=0))
    said = [line for line in capsys.readouterr().out.splitlines() if "were replayed with noise" in line]
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    kept = [line["warning"] for line in lines if "warning" in line]
    if threshold < 0.5:  # in the very first step the student is the teacher
        assert f"--replay-threshold {threshold:g}" in said[0]
        assert [text for text in kept if "were replayed with noise" in text] == said
    else:
        assert not said


def test_a_collapse_is_told_and_written_down(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "at_chance", lambda correct, n, classes: (n, classes) == (32, 3))
    finetune(tiny_config(tmp_path, epochs=1, figures=True))
    # 36 training images in batches of 8: 32 were seen
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    (warning,) = [line["warning"] for line in lines if "warning" in line]
    assert "collapsed" in warning
    assert warning in capsys.readouterr().out


@pytest.mark.parametrize("at", [2, 6])
def test_a_resumed_epoch_is_judged_by_all_of_its_images(at, tmp_path, monkeypatch):
    """Those before the resumption too: whether it has collapsed must not depend on where the run was stopped."""
    judged = []
    monkeypatch.setattr(loop, "at_chance", lambda correct, n, classes: judged.append((correct, n)))
    changes = {"validation_size": 0, "checkpoint_every": 1}
    finetune(tiny_config(tmp_path, **changes))
    whole = judged.copy()
    assert [n for _, n in whole] == [48, 48]
    judged.clear()
    with killed_after(at):
        finetune(tiny_config(tmp_path, output_dir=str(tmp_path / "cut"), **changes))
    finetune(tiny_config(tmp_path, output_dir=str(tmp_path / "cut"), resume=True, **changes))
    assert judged == whole


def test_without_a_clean_pass_the_validation_images_tell(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(loop, "at_chance", lambda correct, n, classes: seen.append(n))
    finetune(tiny_config(tmp_path, epochs=1, method="at"))
    assert seen == [12]


def with_scale(monkeypatch, scale):
    """Runs from now on scale their gradients, as in fp16, which a CPU does not offer."""
    make = train.make_accelerator

    def scaled(*args):
        accelerator = make(*args)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        return accelerator

    monkeypatch.setattr(train, "make_accelerator", scaled)


@pytest.mark.parametrize("epochs", [2, 1000])
def test_a_run_whose_every_step_is_skipped_fails(epochs, tmp_path, monkeypatch):
    """At its end, or once it is futile; it would export the weights that it began with."""
    with_scale(monkeypatch, math.inf)
    with pytest.raises(ArrestError, match=r"none of the (8|64) steps of the robust phase.*--mixed-precision bf16"):
        finetune(tiny_config(tmp_path, epochs=epochs, eval_every=0, log_every=2))
    assert not (tmp_path / "run" / "export").exists()


def test_skipped_steps_are_counted(tmp_path, monkeypatch):
    with_scale(monkeypatch, 3e38)
    changes = {"log_every": 1, "checkpoint_every": 1, "max_steps": 7}
    with killed_after(6):
        finetune(tiny_config(tmp_path, **changes))
    text = (tmp_path / "run" / "log.jsonl").read_text()
    counts = [line["skipped_steps"] for line in map(json.loads, text.splitlines()) if "loss" in line]
    assert 1 == counts[0] <= counts[-1] < 6
    assert counts == sorted(counts)
    finetune(tiny_config(tmp_path, resume=True, **changes))
    last = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [line["skipped_steps"] for line in map(json.loads, last) if "loss" in line][-1] == counts[-1]


def test_weights_that_are_not_finite_are_told_by_the_number_of_the_step():
    """The step of the log and of the checkpoints, not the place in a schedule that other batches made shorter."""
    net = TinyClassifier()
    with torch.no_grad():
        next(net.parameters()).fill_(torch.nan)
    run = SimpleNamespace(accelerator=Accelerator(cpu=True), config=FinetuneConfig())
    with pytest.raises(ArrestError, match="are not finite after step 4"):
        stop_unless_finite(run, Meter(), Progress("robust", step=4, offset=5), net)


def test_a_run_that_skips_all_steps_has_64_to_find_its_scale():
    run = SimpleNamespace(accelerator=Accelerator(cpu=True))
    stop_if_all_skipped(run, SimpleNamespace(step=63, skipped=63, phase="robust"), False)
    with pytest.raises(ArrestError):
        stop_if_all_skipped(run, SimpleNamespace(step=64, skipped=64, phase="robust"), False)
