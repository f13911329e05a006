"""Two CPU processes, as a user starts them (`accelerate launch` starts only one on a CPU unless there is MPI)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import NAMES, tiny_config

from arrest_hub.backbones import load_backbone
from arrest_hub.export import write_model_folder
from arrest_hub.results import read_results
from arrest_hub.train import finetune

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def launch(*arguments: str, launcher: tuple[str, ...] = TORCHRUN) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *launcher, "-m", "arrest_hub", "finetune", *arguments]
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parent.parent), OMP_NUM_THREADS="1")
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, env=environment)


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


def test_two_processes_train_as_one_does(two, tmp_path):
    """Without BatchNorm, a step on two halves of a batch is that on the batch, but for the attack's random start."""
    folder, arguments, _ = two
    torch.manual_seed(0)
    vit = load_backbone(
        "vit_tiny_patch16_224", num_classes=3, image_size=8, model_args={"patch_size": 4, "embed_dim": 12, "depth": 1}
    )
    vit.label_names = NAMES
    write_model_folder(vit, tmp_path / "vit")
    arguments = [*arguments, "--max-steps", "1", "--log-every", "1", "--ema-decay", "none"]
    arguments[arguments.index("--output-dir") + 1] = str(tmp_path / "two")
    arguments[arguments.index("--model") + 1] = str(tmp_path / "vit")
    assert launch(*arguments).returncode == 0
    config = tiny_config(
        folder, model=str(tmp_path / "vit"), output_dir=str(tmp_path / "one"), log_every=1, max_steps=1
    )
    finetune(config)
    one, both = (json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[0]) for name in ("one", "two"))
    assert one["drift"] == both["drift"] == 0
    assert one["clean_accuracy"] == both["clean_accuracy"]
    assert one["cross_entropy"] == pytest.approx(both["cross_entropy"], rel=1e-3)
    trained = [load_file(tmp_path / name / "checkpoints" / "last" / "model.safetensors") for name in ("one", "two")]
    before = load_file(tmp_path / "vit" / "model.safetensors")
    for name, start in before.items():
        moved = (trained[0][name] - start).norm()
        assert (trained[0][name] - trained[1][name]).norm() <= 0.1 * moved + 1e-6, name


def test_resume_on_two_processes_and_bad_input(two):
    _, arguments, _ = two
    again = launch(*arguments, "--resume")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resuming from" in again.stdout
    refused = launch(*arguments)
    assert refused.returncode != 0
    assert refused.stderr.count("error: --output-dir") == 1


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


def test_accelerate_launch_on_a_cpu_says_that_it_started_one_process(two, tmp_path):
    _, arguments, _ = two
    arguments = [*arguments, "--max-steps", "1", "--limit-eval", "6"]
    arguments[arguments.index("--output-dir") + 1] = str(tmp_path / "run")
    launcher = ("accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
                "--mixed_precision", "no", "--dynamo_backend", "no")  # fmt: skip
    result = launch(*arguments, launcher=launcher)
    assert result.returncode == 0, result.stderr
    assert "torchrun --nproc_per_node" in result.stdout
