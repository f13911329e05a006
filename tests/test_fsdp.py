"""FSDP2 on two CPU processes, started as a user does: sharding changes where the weights lie, not what they become."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from test_train import vit_folder
from tiny import tiny_config
from torch import nn

from arrest_hub.backbones import load_backbone
from arrest_hub.checkpoint import read_progress
from arrest_hub.errors import ConfigError
from arrest_hub.prepare import environment_problems
from arrest_hub.results import read_results
from arrest_hub.sharding import block_names, set_up_sharding
from arrest_hub.throughput import TIMED

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def launch(config, folder, *flags, **values):
    """Two processes with an Accelerate configuration; returns what they printed."""
    given = {"batch_size": 4, "attack_steps": 2, "eval_attack_steps": 2, "num_workers": 0, "validation_size": 12,
             "log_every": 1, "lr": 0.05, "epochs": 2, "clip_grad": 1.0, "checkpoint_every": 1, "keep_checkpoints": 9,
             "model": folder / "vit", "dataset": folder / "data"} | values  # fmt: skip
    words = [word for key, value in given.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    launcher += [
        "--config_file",
        ROOT / "recipes/accelerate" / config,
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
    ]
    command = [*launcher, ROOT / "tests" / "steady_main.py", "--no-figures", *words, *flags]
    environment = dict(os.environ, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}", OMP_NUM_THREADS="1")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same training, sharded and not; the threshold makes some batches replay and leave nothing to attack."""
    folder = tmp_path_factory.mktemp("fsdp")
    tiny_config(folder)
    vit_folder(folder / "vit")
    launch("cpu.yaml", folder, output_dir=folder / "whole", replay_threshold=0.02)
    launch("fsdp2.yaml", folder, "--grad-checkpointing", output_dir=folder / "sharded", replay_threshold=0.02)
    return folder


def weights(run, name="checkpoints/last"):
    return load_file(run / name / "model.safetensors")


def test_sharded_training_gives_the_same_weights(runs):
    before = load_file(runs / "vit" / "model.safetensors")
    whole, sharded = weights(runs / "whole"), weights(runs / "sharded")
    assert any((whole[name] - before[name]).abs().max() > 1e-3 for name in before)
    for name in before:
        torch.testing.assert_close(sharded[name], whole[name], rtol=0, atol=1e-5)
    logs = [
        [json.loads(line) for line in (runs / name / "log.jsonl").read_text().splitlines()]
        for name in ("whole", "sharded")
    ]
    rates = [line["replay_rate"] for line in logs[0] if "replay_rate" in line]
    assert 0.0 in rates
    assert 1.0 in rates
    for mine, theirs in zip(*logs, strict=True):
        for key in set(mine) - {*TIMED, "zero_gradient_share", "attack_steps", "phase", "warning"}:
            assert theirs[key] == pytest.approx(mine[key], rel=1e-4, abs=1e-5), key
    # what was found, and the plain library reads it
    found = [read_results(runs / name / "export" / "results.json").results for name in ("whole", "sharded")]
    assert [row.correct for row in found[0]] == [row.correct for row in found[1]]
    timm.create_model(f"local-dir:{runs / 'sharded' / 'export'}", pretrained=True)


def test_a_sharded_run_resumes_bit_for_bit(runs):
    """Back from an earlier checkpoint, of which each process wrote its part."""
    checkpoints = runs / "sharded" / "checkpoints"
    before = weights(runs / "sharded")
    assert (checkpoints / "step-000003" / "pytorch_model_fsdp_0").is_dir()
    assert read_progress(checkpoints / "step-000003").sharded is True
    for step in range(4, 9):
        file = checkpoints / f"step-{step:06d}" / "progress.json"
        file.write_text(file.read_text() + " ")
    out = launch(
        "fsdp2.yaml", runs, "--resume", "--grad-checkpointing", output_dir=runs / "sharded", replay_threshold=0.02
    )
    assert "step-000008 is damaged" in out
    assert "step-000003 (robust phase" in out
    after = weights(runs / "sharded")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_blocks_are_found_in_every_kind_of_network():
    def names(architecture, **args):
        return block_names(load_backbone(architecture, num_classes=3, **args))

    assert names("vit_tiny_patch16_224", image_size=32) == {"Block"}
    assert names("resnet18_cifar", image_size=8) == {"BasicBlock"}
    assert names("convnext_atto", image_size=32) == {"ConvNeXtBlock"}
    assert block_names(nn.Linear(3, 3)) == set()


def test_what_cannot_be_sharded_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    (problem,) = environment_problems(tiny_config(tmp_path, ema_decay=0.9))
    assert "--ema-decay" in problem

    class Fake:
        distributed_type, num_processes = DistributedType.DEEPSPEED, 2

    with pytest.raises(ConfigError, match=r"DEEPSPEED.*fsdp2.yaml"):
        set_up_sharding(Fake())
    Fake.distributed_type = DistributedType.FSDP
    Fake.state = type("State", (), {"fsdp_plugin": type("Plugin", (), {"fsdp_version": 1})})
    with pytest.raises(ConfigError, match="--fsdp_version 2"):
        set_up_sharding(Fake())
