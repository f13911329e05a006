"""Whatever ends a run, the next one goes on from the newest whole checkpoint to the same result."""

import dataclasses
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from filelock import FileLock
from forked import LIBRARIES
from PIL import Image
from safetensors.torch import load_file
from tiny import killed_after, tiny_config, write_images
from torch.distributed.checkpoint import CheckpointException

from arrest_hub import checkpoint, epoch_validation, loop, resume, run_folder
from arrest_hub.checkpoint import Progress, list_checkpoints, read_progress, save_checkpoint
from arrest_hub.cli import parse_finetune
from arrest_hub.config_sources import load_config
from arrest_hub.errors import ArrestError, ConfigError, Terminated
from arrest_hub.eval_config import EvalConfig
from arrest_hub.evaluation import run_evaluation
from arrest_hub.prepare import new_accelerator
from arrest_hub.results import read_results
from arrest_hub.resume import check_origins, dataset_origin
from arrest_hub.splits import load_splits
from arrest_hub.throughput import TIMED
from arrest_hub.train import finetune
from arrest_hub.training_record import read_record

CHANGES = {"checkpoint_every": 1, "keep_checkpoints": 3, "log_every": 1, "ema_decay": 0.9, "epochs": 3}


def run_config(folder, name, **changes):
    return tiny_config(folder, output_dir=str(folder / name), **(CHANGES | changes))


def outcome(run):
    """What two runs to the same end have in common: weights, log, and what is kept."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    lines = [{key: value for key, value in line.items() if key not in TIMED} for line in lines]
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    states = [load_file(path) for path in sorted(run.rglob("*.safetensors"))]
    return lines, names, [{name: tensor.tolist() for name, tensor in state.items()} for state in states]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run, and its folder's parent."""
    folder = tmp_path_factory.mktemp("whole")
    finetune(run_config(folder, "whole"))
    return folder, outcome(folder / "whole")


def stop_at(monkeypatch, look):
    """The run finds SIGTERM to have come when it looks for the ``look``-th time."""

    class Asked:
        looks, exit_code = 0, 143

        @property
        def asked(self):
            self.looks += 1
            return self.looks >= look

    @contextmanager
    def watch():
        yield Asked()

    monkeypatch.setattr(loop, "watch_for_termination", watch)


# an epoch has three looks after a step, two in the validation (12 images in batches of 8), one at its end
@pytest.mark.parametrize(
    ("look", "step", "batch", "to_validate"),
    [(1, 1, 1, False), (3, 3, 3, False), (4, 4, 0, True), (5, 4, 0, True), (6, 4, 0, False), (7, 5, 1, False),
     (18, 12, 0, False)],
)  # fmt: skip
def test_a_run_told_to_stop_goes_on_bit_for_bit(look, step, batch, to_validate, whole, monkeypatch):
    folder, expected = whole
    with monkeypatch.context() as patch:
        stop_at(patch, look)
        with pytest.raises(Terminated, match=f"step {step} of 12; .* is written"):
            finetune(run_config(folder, f"stopped-{look}"))
    run = folder / f"stopped-{look}"
    progress = read_progress(list_checkpoints(run / "checkpoints", "robust")[-1])
    assert (progress.step, progress.batch, progress.to_validate) == (step, batch, to_validate)
    finetune(run_config(folder, run.name, resume=True))
    assert outcome(run) == expected


class CallLater:
    """In place of `AnyProcessBefore`, whose answer is late where there are several processes."""

    def __init__(self, accelerator):
        self.before = False

    def __call__(self, flag):
        answer, self.before = self.before, flag
        return answer


# looks 6, 12 and 18 are at the end of an epoch, and the last one is the end of the training too
@pytest.mark.parametrize(("look", "step"), [(2, 3), (3, 4), (5, 4), (6, 4), (17, 12), (18, 12)])
def test_what_several_processes_are_told_is_never_lost(look, step, whole, monkeypatch):
    folder, _ = whole
    monkeypatch.setattr(loop, "AnyProcessBefore", CallLater)
    stop_at(monkeypatch, look)
    with pytest.raises(Terminated, match=f"step {step} of 12; .* is written"):
        finetune(run_config(folder, f"later-{look}"))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code", "by"), [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C")])
def test_a_signal_to_every_process_of_the_job(number, code, by, whole):
    """As a scheduler or a terminal sends it: the data loading process gets it too, and must not take the run along."""
    folder, expected = whole
    told_run = folder / f"told-{by}"
    values = {"model": folder / "model", "dataset": folder / "data", "output_dir": told_run, **CHANGES,
              "batch_size": 8, "attack_steps": 2, "eval_attack_steps": 1, "num_workers": 1, "validation_size": 12,
              "lr": 0.05}  # fmt: skip
    words = [word for key, value in values.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "arrest_hub", "finetune", "--no-figures", *words]
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parent.parent))
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment
    )
    while process.poll() is None and not list_checkpoints(told_run / "checkpoints", "robust"):
        time.sleep(0.01)
    os.killpg(process.pid, number)
    told = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert time.monotonic() - told < 30
    assert f"stopped by {by}" in errors
    assert "--resume" in errors
    assert "Traceback" not in errors
    again = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False, env=environment)
    assert again.returncode == 0, again.stderr
    assert "resuming from" in again.stdout
    assert outcome(told_run) == expected


def dead_run(folder, name, *, at, **changes):
    """A run that ended in the step after ``at``; its last checkpoints."""
    with killed_after(at):
        finetune(run_config(folder, name, **changes))
    return list_checkpoints(folder / name / "checkpoints", "robust")


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [("model.safetensors", cut, "bytes"), ("optimizer.bin", flip, "contents"),
     ("ema.safetensors", Path.unlink, "missing"), ("manifest.json", cut, "cannot be read"),
     ("progress.json", cut, "bytes")],
)  # fmt: skip
def test_a_damaged_checkpoint_is_passed_over(name, change, why, whole, capsys):
    folder, expected = whole
    run = folder / f"damaged-{name}"
    checkpoints = dead_run(folder, run.name, at=7)
    change(checkpoints[-1] / name)
    (run / "checkpoints" / "latest").symlink_to("step-999999")  # what other tools leave, pointing nowhere
    (run / "checkpoints" / "step-000099").symlink_to("nowhere")
    capsys.readouterr()
    finetune(run_config(folder, run.name, resume=True))
    out = capsys.readouterr().out
    assert f"{checkpoints[-1]} is damaged" in out
    assert why in out
    assert f"resuming from {checkpoints[-2]}" in out
    for link in ("latest", "step-000099"):
        (run / "checkpoints" / link).unlink()
    assert outcome(run) == expected


def test_with_no_whole_checkpoint_the_run_starts_again_and_says_so(whole, capsys):
    folder, expected = whole
    for written in dead_run(folder, "none-whole", at=2):
        cut(written / "model.safetensors")
    finetune(run_config(folder, "none-whole", resume=True))
    assert "no checkpoint is whole" in capsys.readouterr().out
    assert outcome(folder / "none-whole") == expected


def test_a_full_disk_is_one_clear_error_and_costs_nothing(whole, monkeypatch):
    folder, expected = whole
    config = run_config(folder, "full")
    run, plain, limits = folder / "full", loop.save_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(accelerator, where, progress, *rest):
        if progress.step == 6:  # the weights still fit, the optimizer's state does not
            size = (run / "checkpoints" / "step-000005" / "model.safetensors").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, limits[1]))
        return plain(accelerator, where, progress, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", save)
        try:
            with pytest.raises(ArrestError, match=r"step-000006 cannot be written.*--resume"):
                finetune(config)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    kept = {path.name for path in (run / "checkpoints").iterdir()}
    assert kept == {"step-000003", "step-000004", "step-000005", "best-000004"}
    finetune(run_config(folder, "full", resume=True))
    assert outcome(run) == expected


def test_best_weights_of_every_checkpoint_are_kept(tmp_path, monkeypatch):
    """Going back to an earlier checkpoint must not find its best weights replaced by later ones."""
    scores = iter([5, 8, 9, 5])
    plain = epoch_validation.count_correct

    def scored(*args, **kwargs):
        return plain(*args, **kwargs)._replace(n=10, clean=10, robust=next(scores))

    monkeypatch.setattr(epoch_validation, "count_correct", scored)
    finetune(run_config(tmp_path, "run", keep_checkpoints=6))
    checkpoints = tmp_path / "run" / "checkpoints"
    assert {read_progress(path).best_step for path in list_checkpoints(checkpoints, "robust")} == {4, 8, 12}
    assert {path.name for path in checkpoints.glob("best*")} == {"best-000004", "best-000008", "best-000012"}
    finetune(run_config(tmp_path, "short", keep_checkpoints=1, epochs=1))
    assert [path.name for path in (tmp_path / "short" / "checkpoints").glob("best*")] == ["best-000004"]


def test_best_weights_do_not_pile_up_between_checkpoints(tmp_path, monkeypatch):
    scores, plain, seen = iter([5, 8, 9]), epoch_validation.count_correct, []

    def scored(*args, **kwargs):
        seen.append(sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("best*")))
        return plain(*args, **kwargs)._replace(n=10, clean=10, robust=next(scores))

    monkeypatch.setattr(epoch_validation, "count_correct", scored)
    finetune(run_config(tmp_path, "run", checkpoint_every=100))
    assert seen == [[], ["best-000004"], ["best-000008"]]


def test_a_finished_run_stays_one_of_its_own_batch(tmp_path, capsys):
    """Whatever batch it is resumed with: to evaluate with less memory, say."""
    finetune(run_config(tmp_path, "run"))
    shutil.rmtree(tmp_path / "run" / "export")
    capsys.readouterr()
    finetune(run_config(tmp_path, "run", resume=True, batch_size=4))
    assert "no longer that of a run without the change" not in capsys.readouterr().out, "nothing is trained with it"
    assert load_config(tmp_path / "run" / "config.yaml").batch_size == 8
    published = yaml.safe_load((tmp_path / "run" / "export" / "training_config.yaml").read_text())
    assert published["batch_size"] == 8


def test_a_run_that_died_before_its_first_checkpoint_records_its_new_batch(tmp_path):
    assert dead_run(tmp_path, "run", at=1, checkpoint_every=100) == []
    finetune(run_config(tmp_path, "run", resume=True, batch_size=4, checkpoint_every=100))
    assert load_config(tmp_path / "run" / "config.yaml").batch_size == 4
    published = yaml.safe_load((tmp_path / "run" / "export" / "training_config.yaml").read_text())
    assert published["batch_size"] == 4


def test_another_batch_size_goes_on_at_the_end_of_an_epoch(tmp_path, capsys):
    dead_run(tmp_path, "first", at=3)
    with pytest.raises(ConfigError, match=r"--batch-size 8 then and 4 now.*end of an epoch"):
        finetune(run_config(tmp_path, "first", resume=True, batch_size=4))
    assert load_config(tmp_path / "first" / "config.yaml").batch_size == 8
    left = dead_run(tmp_path, "run", at=6, keep_checkpoints=1)
    assert [path.name for path in left] == ["step-000004", "step-000006"], "the end of the epoch stays"
    capsys.readouterr()
    finetune(run_config(tmp_path, "run", resume=True, batch_size=4))
    out = capsys.readouterr().out
    assert "going back from step 6 to 4" in out
    assert "no longer that of a run without the change" in out
    assert load_config(tmp_path / "run" / "config.yaml").batch_size == 4
    # one epoch of 4 steps, then two of 9
    progress = read_progress(list_checkpoints(tmp_path / "run" / "checkpoints", "robust")[-1])
    assert (progress.step, progress.epoch, progress.offset, progress.place) == (22, 3, 5, 27)
    record = read_record(tmp_path / "run" / "export" / "training_record.json")
    assert record.epochs == round((4 * 8 + 18 * 4) / record.data.num_examples, 2)
    earlier = "until step 4 of the robust phase: 1 process with --batch-size 8 --grad-accum-steps 1"
    assert record.earlier == [earlier]
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    assert f"This command does not repeat the run, which went on with other batches: {earlier}." in card
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    rates = {line["step"]: line["lr"] for line in lines if "lr" in line}
    assert list(rates) == [1, 2, 3, 4, *range(5, 23)]
    assert rates[4] > rates[5] > 50 * rates[22] > 0, "the schedule stays with the epochs"


@pytest.mark.parametrize("before", [False, True])
def test_a_checkpoint_in_parts_goes_on_in_parts_alone(before, tmp_path, monkeypatch):
    dead_run(tmp_path, "run", at=3)
    monkeypatch.setattr(resume, "is_sharded", lambda accelerator: not before)
    monkeypatch.setattr(resume, "read_progress", lambda path: dataclasses.replace(read_progress(path), sharded=before))
    words = ("with", "without", "fsdp2.yaml") if before else ("without", "with", "another configuration")
    with pytest.raises(ConfigError, match=r"written {} FSDP, and this is a run {} it.*{}".format(*words)):
        finetune(run_config(tmp_path, "run", resume=True))


def test_a_full_disk_of_parts_is_one_clear_error(tmp_path, monkeypatch):
    error = CheckpointException("x", {0: (OSError(28, "No space left on device"), None)})

    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(Accelerator, "save_state", full)
    with pytest.raises(ArrestError, match=r"cannot be written: OSError: \[Errno 28\] No space left on device \("):
        finetune(run_config(tmp_path, "run"))


def test_an_epoch_in_which_a_checkpoint_falls_ends_with_one(tmp_path, monkeypatch):
    """From there alone a run can go on with other processes."""
    written, plain = [], loop.save_checkpoint

    def save(accelerator, where, progress, *rest):
        written.append((progress.step, progress.batch))
        return plain(accelerator, where, progress, *rest)

    monkeypatch.setattr(loop, "save_checkpoint", save)
    finetune(run_config(tmp_path, "run", checkpoint_every=6, epochs=4, keep_checkpoints=1))  # of 4 steps
    assert written == [(6, 2), (8, 0), (12, 0), (16, 0)], "none in the first epoch, the last at the end of the run"
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints", "robust")] == ["step-000016"]


def test_a_stream_goes_on_on_a_machine_with_other_cores(tmp_path, capsys):
    """The default number of loading processes is another there, and the order of a stream depends on it."""
    changes = {"streaming": True, "max_steps": 6, "keep_checkpoints": 1}
    finetune(run_config(tmp_path, "whole", num_workers=1, **changes))
    expected = outcome(tmp_path / "whole")
    dead_run(tmp_path, "run", at=3, num_workers=1, **changes)
    capsys.readouterr()
    finetune(run_config(tmp_path, "run", num_workers=0, resume=True, **changes))
    out = capsys.readouterr().out
    assert "data loading processes: 1, as before, and not 0" in out
    assert "no longer that of a run without the change" not in out
    assert outcome(tmp_path / "run") == expected


def test_a_run_goes_on_from_python_with_its_own_values_alone(tmp_path):
    dead_run(tmp_path, "run", at=2)
    with pytest.raises(ConfigError) as error:
        finetune(run_config(tmp_path, "run", resume=True, lr=0.5, eps="1/255", keep_checkpoints=1))
    assert [problem.split(":")[0] for problem in error.value.problems] == [
        "--eps is 1/255 but the run to resume has 8/255", "--lr is 0.5 but the run to resume has 0.05"
    ]  # fmt: skip


def test_a_run_goes_on_from_another_folder(tmp_path, monkeypatch):
    """What was a local folder stays one, however it was written, and is never looked for on the Hub."""
    tiny_config(tmp_path)  # writes both
    local = {"model": "model", "dataset": "data"}
    (tmp_path / "elsewhere" / "model").mkdir(parents=True)  # another that goes by the same name
    monkeypatch.chdir(tmp_path)
    dead_run(tmp_path, "run", at=2, **local)
    assert load_config(tmp_path / "run" / "config.yaml").dataset == str(tmp_path / "data")
    monkeypatch.chdir(tmp_path / "elsewhere")
    config, _ = parse_finetune(["--resume", "--output-dir", str(tmp_path / "run")])
    assert (config.model, config.dataset) == (str(tmp_path / "model"), str(tmp_path / "data"))
    same = {"--model": "../model", "--dataset": str(tmp_path / "data")}
    words = [word for pair in same.items() for word in pair]
    assert parse_finetune(["--resume", "--output-dir", str(tmp_path / "run"), *words])[0].model == "../model"
    with pytest.raises(ConfigError, match=r"--model is model but the run to resume has .*/model:"):
        parse_finetune(["--resume", "--output-dir", str(tmp_path / "run"), "--model", "model"])
    (tmp_path / "data").rename(tmp_path / "moved")
    words = ["--resume", "--output-dir", str(tmp_path / "run"), "--dataset", "../moved"]
    finetune(parse_finetune(words)[0])


def test_a_finished_export_keeps_what_was_added_to_it(tmp_path, capsys):
    finetune(run_config(tmp_path, "run", epochs=1))
    export = tmp_path / "run" / "export"
    run_evaluation(EvalConfig(
        model=str(export), dataset=str(tmp_path / "data"), attacks="clean,pgd-1", eps_curve="0:16/255:3",
        curve_images=6, batch_size=8, num_workers=0, checks=False, output_dir=str(tmp_path / "evaluation"),
    ))  # fmt: skip
    with (export / "README.md").open("a") as card:
        card.write("\nWritten by hand.\n")
    before = contents(export)
    assert "figures/eps_curve.png" in before
    finetune(run_config(tmp_path, "run", epochs=1, resume=True))
    assert "is left as it is" in capsys.readouterr().out
    assert contents(export) == before

    (export / "results.json").write_text("{")  # what the push says to mend in this way
    finetune(run_config(tmp_path, "run", epochs=1, resume=True))
    assert read_results(export / "results.json").get("robust_accuracy").n == 48
    assert (export / "README.md").read_text().endswith("Written by hand.\n")
    assert "README.md was edited and is left as it is" in capsys.readouterr().out


def contents(folder):
    """Every file's bytes, by its path in the folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_runs_in_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "LOCK_SECONDS", 0.2)
    finetune(run_config(tmp_path, "run", epochs=1))
    before = outcome(tmp_path / "run")
    for changes in ({"resume": True}, {"overwrite": True}):
        with FileLock(tmp_path / "run" / ".lock"), pytest.raises(ArrestError, match="in use by another run"):
            finetune(run_config(tmp_path, "run", epochs=1, **changes))
        assert outcome(tmp_path / "run") == before
    finetune(run_config(tmp_path, "run", epochs=1, overwrite=True))
    assert outcome(tmp_path / "run") == before


def test_a_run_that_came_between_is_not_replaced(tmp_path, monkeypatch):
    """Loading takes its time, in which another run may begin and end: the folder is looked at again once it is held."""
    finetune(run_config(tmp_path, "run", epochs=1))
    before = contents(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("arrest_hub.train.output_dir_problems", lambda config, paths: [])  # as it was before
        with pytest.raises(ArrestError, match="already holds a run"):
            finetune(run_config(tmp_path, "run", epochs=1, seed=7))
    assert contents(tmp_path / "run") == before


def test_a_start_killed_at_any_file_can_be_started_again(tmp_path, monkeypatch):
    """Whatever was made before the kill, the folder is a run's, and --resume and --overwrite take it."""
    make, give_its_name = Path.mkdir, os.replace

    def killed_making(path, *arguments, **options):
        if path.name == "checkpoints":
            raise KeyboardInterrupt
        make(path, *arguments, **options)

    def killed_naming(source, target):
        if Path(target).name == "config.yaml":
            raise KeyboardInterrupt
        give_its_name(source, target)

    starts = [(os, "replace", killed_naming), (Path, "mkdir", killed_making)]
    for number, (again, kill) in enumerate(itertools.product(({"resume": True}, {"overwrite": True}), starts)):
        run = tmp_path / f"run-{number}"
        for _ in range(2):  # another start may be killed there too
            with monkeypatch.context() as patch:
                patch.setattr(*kill)
                with pytest.raises(KeyboardInterrupt):
                    finetune(run_config(tmp_path, run.name, epochs=1, overwrite=True))
        finetune(run_config(tmp_path, run.name, epochs=1, **again))
        assert (run / "export" / "README.md").is_file()
        assert not list(run.glob("*.tmp"))


def test_a_card_written_by_hand_outlives_a_kill_while_the_export_is_replaced(tmp_path, monkeypatch):
    finetune(run_config(tmp_path, "run", epochs=1))
    export = tmp_path / "run" / "export"
    with (export / "README.md").open("a") as card:
        card.write("\nWritten by hand.\n")
    (export / "results.json").unlink()
    plain = Path.rename

    def killed(path, target):
        if Path(target) == export:
            raise KeyboardInterrupt
        return plain(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            finetune(run_config(tmp_path, "run", epochs=1, resume=True))
    assert not export.exists()
    finetune(run_config(tmp_path, "run", epochs=1, resume=True))
    assert (export / "README.md").read_text().endswith("Written by hand.\n")
    assert read_results(export / "results.json").get("robust_accuracy").n == 48
    assert [path.name for path in (tmp_path / "run").glob("export*")] == ["export"]


def test_another_model_or_dataset_of_the_same_name_is_no_resumption(tmp_path):
    dead_run(tmp_path, "run", at=5)

    def refused(name):
        with pytest.raises(ConfigError, match=f"cannot resume: the {name} was sha256:.* and is sha256:"):
            finetune(run_config(tmp_path, "run", resume=True))

    data, model = tmp_path / "data", tmp_path / "model" / "model.safetensors"
    for changes in ({"count": 51}, {"size": 9}, {"splits": ("test", "train")}):  # other images, pixels, order
        write_images(data, **changes)
        refused("dataset")
    write_images(data)
    kept = model.read_bytes()
    flip(model)
    refused("model")
    model.write_bytes(kept)
    model.with_name("optimizer.pt").write_bytes(b"of a trainer, and no weights")
    finetune(run_config(tmp_path, "run", resume=True))


def test_an_image_that_cannot_be_read_may_be_repaired(tmp_path):
    files = [tmp_path / "images" / split / name / "0.png" for split in ("train", "test") for name in ("cat", "dog")]
    for number, path in enumerate(files):
        path.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)

    def origin():
        return dataset_origin(load_splits(str(tmp_path / "images"), validation_size=0))

    whole, content = origin(), files[0].read_bytes()
    assert whole == origin()
    files[0].write_bytes(content[:40])
    assert origin() is None, "it says nothing, and a run goes on"
    Image.new("RGB", (8, 8), (0, 9, 0)).save(files[0])
    assert origin() not in (whole, None)
    files[0].write_bytes(content)
    assert origin() == whole
    check_origins(tmp_path, None, None)


def test_best_weights_that_are_gone_are_one_clear_error(tmp_path):
    finetune(run_config(tmp_path, "run", epochs=1))
    shutil.rmtree(tmp_path / "run" / "export")
    for folder in (tmp_path / "run" / "checkpoints").glob("best-*"):
        shutil.rmtree(folder)
    with pytest.raises(ArrestError, match=r"best-000004 is gone.*checkpoints/last"):
        finetune(run_config(tmp_path, "run", epochs=1, resume=True))


def test_damaged_lines_of_the_log_are_left_out(tmp_path):
    damage = b'\xff\n123\n{}\n{"phase": 1, "step": 2}\n'
    dead_run(tmp_path, "run", at=5)
    log = tmp_path / "run" / "log.jsonl"
    log.write_bytes(damage + log.read_bytes() + damage + b'{"phase": "robust", ')
    finetune(run_config(tmp_path, "run", resume=True, figures=True))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))


def train_in_child(values):
    """The target of a process that is going to be killed."""
    os.setsid()
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    torch.set_num_threads(1)
    finetune(dataclasses.replace(tiny_config(Path(values.pop("folder"))), **values))


def test_killed_between_the_last_checkpoint_and_the_deletion_of_the_oldest(whole, monkeypatch):
    folder, expected = whole
    run, remove = folder / "not deleted", checkpoint._remove

    def killed(path):
        if path.name in ("step-000008", "step-000009"):  # as it is at the end of an epoch, step 8 goes with step 9
            raise KeyboardInterrupt
        remove(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_remove", killed)
        with pytest.raises(KeyboardInterrupt):
            finetune(run_config(folder, run.name))
    steps = [read_progress(path).step for path in list_checkpoints(run / "checkpoints", "robust")]
    assert steps == [8, 9, 10, 11, 12]
    finetune(run_config(folder, run.name, resume=True))
    assert outcome(run) == expected


@pytest.fixture
def forking():
    """What forks processes that have imported the package, which those of other tests must not have (forked.py)."""
    context = multiprocessing.get_context("forkserver")
    forkserver._forkserver._stop()  # there is one in a process
    context.set_forkserver_preload(["arrest_hub.train", "tiny"])
    yield context
    forkserver._forkserver._stop()
    context.set_forkserver_preload(list(LIBRARIES))


@pytest.mark.slow
def test_twenty_kills_at_random_moments(tmp_path, whole, forking):
    """SIGKILL, every other time as soon as a checkpoint is being written; what the run then makes is the same."""
    _, expected = whole
    tiny_config(tmp_path)  # data and model
    chance = random.Random(0)
    kills = writing = runs = 0
    started = time.monotonic()
    while kills < 20:
        assert time.monotonic() - started < 200
        run = tmp_path / f"run-{runs}"
        values = {**CHANGES, "folder": str(tmp_path), "output_dir": str(run), "resume": True}
        child = forking.Process(target=train_in_child, args=(values,))
        child.start()
        in_writing = kills % 2 == 1
        moment = time.monotonic() + chance.uniform(0.3, 3.0)
        begin = chance.randrange(1, 6)
        seen = set()
        while child.is_alive():
            if in_writing:
                seen |= {path.name for path in (run / "checkpoints").glob("step-*.tmp")}
            if len(seen) >= begin if in_writing else time.monotonic() > moment:
                break
        if child.is_alive():
            child.kill()
            kills += 1
            child.join()
            writing += any((run / "checkpoints").glob("*.tmp")) if run.exists() else 0
            continue
        child.join()
        assert child.exitcode == 0
        assert outcome(run) == expected
        runs += 1
    values = {**CHANGES, "folder": str(tmp_path), "output_dir": str(run), "resume": True}
    finetune(dataclasses.replace(tiny_config(tmp_path), **{k: v for k, v in values.items() if k != "folder"}))
    assert outcome(run) == expected
    assert writing >= 3


def test_a_folder_that_another_node_does_not_see(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "SHARED_SECONDS", 0.1)
    paths = run_folder.RunPaths(tmp_path / "run")
    assert "storage that all nodes share" in run_folder._not_shared(paths, 3)
    paths.root.mkdir()
    paths.config.touch()
    assert run_folder._not_shared(paths, 3) is None


def test_another_accumulation_begins_with_a_whole_step(tmp_path, monkeypatch):
    """Where the batches before the checkpoint are no multiple of the new number."""
    changes = {"batch_size": 6, "epochs": 3, "eval_every": 0}
    with killed_after(5):
        finetune(tiny_config(tmp_path, grad_accum_steps=4, **changes))
    plain, updates = loop.train_step, []

    def noted(accelerator, *rest):
        parts = plain(accelerator, *rest)
        updates.append(accelerator.sync_gradients)
        return parts

    monkeypatch.setattr(loop, "train_step", noted)
    finetune(tiny_config(tmp_path, grad_accum_steps=3, resume=True, **changes))
    assert updates == [False, False, True] * 4, "two epochs of two steps"


def test_checkpoints_of_a_course_given_up_are_not_the_newest(tmp_path):
    accelerator = new_accelerator(project_dir=str(tmp_path))
    for step in (2, 4, 6):
        save_checkpoint(accelerator, tmp_path, Progress("robust", step=step), None, 9)
    save_checkpoint(accelerator, tmp_path, Progress("robust", step=3), None, 2)
    assert [path.name for path in list_checkpoints(tmp_path, "robust")] == ["step-000002", "step-000003"]
