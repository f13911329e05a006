"""Two CPU processes, as a user starts them (`accelerate launch` starts only one on a CPU unless there is MPI)."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import steady_main
import torch
from forked import run_two
from safetensors.torch import load_file
from test_corrupt_run import damage
from tiny import NAMES, tiny_config

from arrest_hub import train
from arrest_hub.backbones import load_backbone
from arrest_hub.checkpoint import list_checkpoints, read_progress
from arrest_hub.export import write_model_folder
from arrest_hub.results import read_results
from arrest_hub.throughput import TIMED
from arrest_hub.train import finetune

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")


ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}


def launch(*arguments: str, launcher: tuple[str, ...] = TORCHRUN, wait: bool = True) -> Any:
    """Two processes of `arrest_hub finetune`: how they ended, or (not ``wait``) Popen."""
    command = [sys.executable, "-m", *launcher, "-m", "arrest_hub", "finetune", *arguments]
    if not wait:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, env=ENVIRONMENT)


def run_file(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Two processes of a file beside this one."""
    here = Path(__file__).parent
    return run_two([str(here / name), *arguments], env=ENVIRONMENT, cwd=here, timeout=240)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run on two processes of four images each, and the arguments it had."""
    folder = tmp_path_factory.mktemp("two")
    config = tiny_config(folder, batch_size=4, output_dir=str(folder / "two"), ema_decay=0.9)
    arguments = []
    for key in ("model", "dataset", "output_dir", "epochs", "batch_size", "attack_steps", "eval_attack_steps",
                "num_workers", "validation_size", "log_every", "lr", "ema_decay"):  # fmt: skip
        arguments += ["--" + key.replace("_", "-"), str(getattr(config, key))]
    result = launch(*arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder, arguments, result


def test_two_processes_finish_and_count_every_image_once(two):
    folder, _, result = two
    report = read_results(folder / "two" / "export" / "results.json")
    assert [row.n for row in report.results + report.teacher_results] == [48] * 4
    assert result.stdout.count("student (arrest)") == 1, "one process speaks"
    assert "batch 4 x 2 processes x 1 accumulated = 8" in result.stdout
    lines = [json.loads(line) for line in (folder / "two" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8]
    states = {path.name for path in (folder / "two" / "checkpoints" / "step-000008").iterdir()}
    assert {"random_states_0.pkl", "random_states_1.pkl", "ema.safetensors"} <= states


def test_the_teachers_figures_are_those_of_one_process(two, tmp_path):
    """Same weights, so the counts must not depend on how many processes counted."""
    folder, _, _ = two
    one = finetune(
        tiny_config(folder, batch_size=4, output_dir=str(tmp_path / "one"), epochs=1, export_weights="last", lr=1e-9)
    )
    report = read_results(folder / "two" / "export" / "results.json")
    assert [row.correct for row in one.report.teacher_results] == [row.correct for row in report.teacher_results]


def test_what_two_processes_do_together(two):
    """The attack reaches no other process, and none waits for one that has nothing to attack or to count, has run out
    of memory in a rehearsal, or cannot write; all wait for the main one, however long it takes."""
    folder, _, _ = two
    found = json.loads(run_file("two_processes.py", str(folder)).stdout.splitlines()[-1])
    calls = found["collectives"]
    assert calls["attack"] == 0
    assert (calls["is wrapped"], calls["wrapped"]) == (1, 2), "one pass a step"
    assert 0 < calls["step"] == calls["long step"] <= 4, "the gradients' sum and the buffers' broadcast"
    assert found["replay"]["difference"] <= 1e-6 < 1e-3 < found["replay"]["moved"]
    assert found["replay"]["replay rate"] == 0.5
    perturbed = found["perturbed"]
    assert perturbed["difference"] <= 1e-6 < 1e-4 < min(perturbed["moved"], perturbed["perturbed"])
    for size, (counted, correct, right) in found["counted"].items():
        assert (counted, correct) == (int(size), right)
    assert found["rehearsed"] == 0
    # where a stream is shared out by how many workers read it, they must be equally many
    assert found["workers"] == [[3, 8], [3, 3]]
    assert found["waited"] == [["loaded"] * 2] * 2
    first, second = found["load that fails"]["missing"]
    assert first.startswith("ArrestError: process 1 on ")
    assert first.endswith(": no such folder here")
    assert second.startswith("AlreadyReported")
    first, second = found["load that fails"]["full"]
    assert first.startswith("OtherProcessFailed: another process")
    assert second.startswith("OSError: ")
    first, second = found["load that fails"]["silent"]
    assert first.startswith("ArrestError: nothing was heard of process 1 for ")
    assert second.startswith("AlreadyReported")
    evaluated = found["evaluated"]
    assert evaluated["wrapped"] == evaluated["network"]
    first, second = evaluated["failing"]
    assert re.fullmatch("ArrestError: process 1 on .*: not finite", first)
    assert second.startswith("AlreadyReported")
    first, second = evaluated["other images"]
    assert re.match("ConfigError: process 1 on .* has other images than the main process", first)
    assert second.startswith("AlreadyReported")
    assert found["teacher"] == ["resnet18_cifar"] * 2
    assert found["full disks"].keys() == {"teacher", "export", "card", "log", "lock", "record"}
    for name, (first, second) in found["full disks"].items():
        assert first.startswith("ArrestError: the weights " if name == "teacher" else "OSError: ")
        assert "No space left on device" in first, name
        assert second.startswith("AlreadyReported" if name == "teacher" else "OtherProcessFailed"), name


def test_two_processes_train_as_one_does(two, tmp_path, monkeypatch):
    """Without BatchNorm and with an attack that draws nothing, a step on two halves of a batch is that on the batch."""
    folder, arguments, _ = two
    torch.manual_seed(0)
    vit = load_backbone(
        "vit_tiny_patch16_224", num_classes=3, image_size=8, model_args={"patch_size": 4, "embed_dim": 12, "depth": 1}
    )
    vit.label_names = NAMES
    write_model_folder(vit, tmp_path / "vit")
    arguments = [*arguments, "--log-every", "1", "--grad-accum-steps", "2", "--batch-size", "3"]
    arguments[arguments.index("--output-dir") + 1] = str(tmp_path / "two")
    arguments[arguments.index("--model") + 1] = str(tmp_path / "vit")
    done = run_file("steady_main.py", *arguments)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(train, "pgd", steady_main.steady_pgd)
    monkeypatch.setattr(train, "random_in_ball", steady_main.steady_ball)
    config = tiny_config(
        folder, model=str(tmp_path / "vit"), output_dir=str(tmp_path / "one"), log_every=1, ema_decay=0.9,
        batch_size=12, checkpoint_every=1,
    )  # fmt: skip
    finetune(config)
    one, both = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert len(one) == len(both) == 11, "two epochs of three steps, a validation, warnings (at chance, replayed)"
    for mine, theirs in zip(one, both, strict=True):
        for key, value in mine.items():
            if key not in TIMED:
                expected = value if isinstance(value, str) else pytest.approx(value, rel=1e-4, abs=2e-6)
                assert theirs[key] == expected, key
    before = load_file(tmp_path / "vit" / "model.safetensors")
    trained = [load_file(tmp_path / name / "checkpoints" / "last" / "model.safetensors") for name in ("one", "two")]
    assert any((trained[0][name] - start).abs().max() > 1e-3 for name, start in before.items())
    for name in before:
        torch.testing.assert_close(trained[0][name], trained[1][name], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_two_processes_stop_at_sigterm_and_one_goes_on(two, tmp_path, capsys):
    folder, arguments, _ = two
    arguments = [*arguments, "--checkpoint-every", "1", "--keep-checkpoints", "20"]
    arguments[arguments.index("--output-dir") + 1] = str(tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    process = launch(*arguments, wait=False)
    while process.poll() is None and not (checkpoints / "step-000005").exists():
        time.sleep(0.01)
    process.terminate()  # torchrun passes it on
    _, errors = process.communicate(timeout=60)
    assert errors.count("stopped by SIGTERM") == 1
    assert process.returncode != 0
    last = list_checkpoints(checkpoints, "robust")[-1]
    whole = folder / "two" / "checkpoints" / "step-000008"

    shutil.copytree(tmp_path / "run", tmp_path / "both")
    arguments[arguments.index("--output-dir") + 1] = str(tmp_path / "both")
    again = launch(*arguments, "--resume")
    assert f"{last.name} (robust phase" in again.stdout
    a, b = (load_file(path / "ema.safetensors") for path in (whole, tmp_path / "both" / "checkpoints" / whole.name))
    assert all(torch.equal(a[name], b[name]) for name in a)

    config = tiny_config(
        folder, output_dir=str(tmp_path / "run"), batch_size=4, ema_decay=0.9, checkpoint_every=1,
        keep_checkpoints=20, resume=True,
    )  # fmt: skip
    finetune(config)
    out = capsys.readouterr().out
    assert "number of processes 2 then and 1 now" in out
    assert "step-000004 (robust phase, step 4 of 13)" in out
    assert read_progress(list_checkpoints(checkpoints, "robust")[-1]).place == 18


@pytest.mark.slow
def test_a_folder_with_a_run_is_refused_on_two_processes(two):
    _, arguments, _ = two
    refused = launch(*arguments)
    assert refused.returncode != 0
    assert refused.stderr.count("error: --output-dir") == 1


@pytest.mark.slow
def test_one_clear_error_on_two_processes(two, tmp_path):
    _, arguments, _ = two
    arguments = list(arguments)
    arguments[arguments.index("--output-dir") + 1] = str(tmp_path / "run")
    arguments[arguments.index("--dataset") + 1] = str(tmp_path / "nowhere")
    result = launch(*arguments)
    assert result.returncode != 0
    # torchrun adds a traceback of its own; the processes of the run add none
    assert result.stderr.count("error: ") == 1
    assert "nowhere" in result.stderr
    assert "[rank" not in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_one_process_finds_is_said_once_and_before_what_the_other_says(two, tmp_path):
    folder, arguments, _ = two
    shutil.copytree(folder / "data", tmp_path / "data")
    damage(tmp_path, [7])
    arguments = list(arguments)
    arguments[arguments.index("--output-dir") + 1] = str(tmp_path / "run")
    arguments[arguments.index("--dataset") + 1] = str(tmp_path / "data")
    result = launch(*arguments, "--validation-size", "0")
    assert result.returncode != 0
    said = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "image 7" in said[0]
    assert all("another process of the run ended" in line for line in said[1:])
    assert "[rank" not in result.stderr


@pytest.mark.slow
def test_accelerate_launch_on_a_cpu_says_that_it_started_one_process(two, tmp_path):
    _, arguments, _ = two
    arguments = [*arguments, "--max-steps", "1", "--limit-eval", "6"]
    arguments[arguments.index("--output-dir") + 1] = str(tmp_path / "run")
    launcher = ("accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
                "--mixed_precision", "no", "--dynamo_backend", "no")  # fmt: skip
    result = launch(*arguments, launcher=launcher)
    assert result.returncode == 0, result.stderr
    assert "torchrun --nproc_per_node" in result.stdout
