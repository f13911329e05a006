"""How runs are started: Accelerate's configurations, the SLURM script, the commands of docs/scaling.md."""

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from arrest_hub.cli import parse_finetune
from arrest_hub.recipe_files import list_recipes

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))


def parsed(command):
    """What `accelerate launch` makes of a command line, and the flags that are left for arrest-finetune."""
    words = shlex.split(command.replace("$RANK", "1"))
    assert words[:2] == ["accelerate", "launch"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words[2:]))
    assert (args.module, args.training_script) == (True, "arrest_hub")
    assert args.training_script_args[0] == "finetune"
    return args, args.training_script_args[1:]


def commands(text):
    """The commands in comments or code blocks, with their continued lines joined."""
    text = re.sub(r"\\\n[# ]*", "", text)
    return [
        line.lstrip("# ").strip() for line in text.splitlines() if line.lstrip("# ").startswith("accelerate launch")
    ]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations_are_what_accelerate_reads(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config_from_file(str(path))
    assert set(yaml.safe_load(path.read_text())) <= set(config.to_dict()) | {"fsdp_config"}
    (command,) = commands(path.read_text())
    args, flags = parsed(command)
    assert args.config_file == path.relative_to(ROOT).as_posix()
    assert args.multi_gpu == (path.stem not in ("one_gpu", "fsdp2"))
    assert args.use_fsdp == (path.stem == "fsdp2")
    assert args.mixed_precision == "no", "the precision is arrest-finetune's to choose"
    if path.stem == "multi_node":
        assert (args.num_machines, args.num_processes, str(args.machine_rank)) == (2, 16, "1")
        assert (args.main_process_ip, args.main_process_port) == ("node0", 29500)
    parse_finetune(flags)


def test_they_are_no_recipes():
    assert len(CONFIGS) >= 5
    assert not {path.stem for path in CONFIGS} & set(list_recipes())


def test_commands_of_the_scaling_page(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs" / "scaling.md").read_text()
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    lines = [line.strip().removeprefix("sudo ") for line in blocks.splitlines() if line.strip()]
    assert len(lines) > 10
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[0] == "accelerate":
            flags = parsed(line)[1]
        elif words[0] == "torchrun":
            flags = words[words.index("finetune") + 1 :]
        elif words[0] == "sbatch":
            script = next(number for number, word in enumerate(words) if word.endswith(".sbatch"))
            assert (ROOT / words[script]).is_file()
            flags = words[script + 1 :]
        elif words[0] == "arrest-finetune":
            flags = words[1:]
        else:
            assert words[0] == "python", line
            assert (ROOT / words[1]).is_file()
            continue
        parse_finetune(flags)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A SLURM of two nodes with two GPUs each, made of shell scripts that write down how they were called."""
    tools = {
        "srun": """[ "$SLURM_NNODES" = 2 ] || exec "${@:2}"
            for node in 0 1; do SLURM_NODEID=$node "${@:2}" & done
            wait -n || { code=$?; kill %1 %2; exit $code; }
            wait -n""",
        "python": 'echo "python $@" >> calls; exit "${ENDS:-0}"',
        "accelerate": 'echo "$@" >> calls; trap "exit 143" TERM; sleep "${LASTS:-0}" & wait $!; exit "${ENDS:-0}"',
        "scontrol": 'if [ "$1" = show ]; then printf "node0\\nnode1\\n"; else echo "scontrol $@" >> calls; fi',
        "scancel": 'echo "scancel $@" >> calls; pkill -TERM -f "sleep ${LASTS:-0}" ; exit 0',
    }
    for name, body in tools.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)

    def submit(*arguments, wait=True, **variables):
        environment = dict(
            os.environ, PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_ID="4242",
            SLURM_JOB_NODELIST="node[0-1]", **{"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "2"} | variables,
        )  # fmt: skip
        process = subprocess.Popen(["bash", ROOT / "scripts/slurm/finetune.sbatch", *arguments], env=environment)
        return process.wait() if wait else process

    def calls():
        return (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []

    return submit, calls


def test_slurm_starts_a_launcher_on_every_node(cluster, monkeypatch):
    submit, calls = cluster
    assert submit("--recipe", "imagenet_vit_small", "--output-dir", "runs/with space") == 0
    found = sorted(calls())
    assert len(found) == 2
    monkeypatch.chdir(ROOT)
    for rank, call in enumerate(found):
        args, flags = parsed("accelerate " + call.replace("with space", "'with space'"))
        assert (args.num_machines, args.num_processes, str(args.machine_rank)) == (2, 4, str(rank))
        assert (args.main_process_ip, args.main_process_port) == ("node0", 24242)
        config, _ = parse_finetune(flags)
        assert (config.output_dir, config.resume) == ("runs/with space", False)


def test_slurm_starts_a_single_process_without_a_launcher(cluster):
    """Which would die of SIGTERM before its process has written a checkpoint."""
    submit, calls = cluster
    one = {"SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "1"}
    assert submit("--output-dir", "runs/one", **one) == 0
    assert submit("--output-dir", "runs/one", **one, SLURM_RESTART_COUNT="1", ENDS="143") == 143
    start = "python -m arrest_hub finetune --output-dir runs/one"
    assert calls() == [start, start + " --resume"]


def test_slurm_resumes_what_was_put_back(cluster):
    submit, calls = cluster
    assert submit("--recipe", "imagenet_vit_small", SLURM_RESTART_COUNT="1") == 0
    assert all(call.endswith("--recipe imagenet_vit_small --resume") for call in calls())
    assert submit("--resume", "--recipe", "quickstart", SLURM_RESTART_COUNT="2") == 0
    assert all(call.count("--resume") == 1 for call in calls())
    assert submit("--overwrite", "--output-dir", "runs/a b", SLURM_RESTART_COUNT="1") == 0
    assert all(call.endswith("finetune --output-dir runs/a b --resume") for call in calls()[-2:])
    assert submit("--overwrite", "--output-dir", "runs/a") == 0
    assert all(call.endswith("finetune --overwrite --output-dir runs/a") for call in calls()[-2:])


def test_slurm_requeues_after_sigterm_and_only_then(cluster):
    submit, calls = cluster
    assert submit("--recipe", "quickstart", ENDS="1") == 1
    assert not [call for call in calls() if "requeue" in call], "an error would only come again"
    before = len(calls())  # the other launcher may have been stopped before it began
    process = submit("--recipe", "quickstart", wait=False, LASTS="617", ENDS="143")
    while len(calls()) < before + 2:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    assert calls()[-2:] == ["scancel --signal=TERM 4242", "scontrol requeue 4242"]
