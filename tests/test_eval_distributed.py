"""Two processes give what one gives, verdict for verdict, and a run may change their number when it goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from forked import run_two
from tiny import write_images, write_model

from arrest_hub.cli import eval_command
from arrest_hub.results import read_results
from arrest_hub.verdicts import read_verdicts

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
# on a CPU without MPI `accelerate launch --cpu` starts one process; told that they use the CPU by the environment,
# it starts as many as it is asked for
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")  # fmt: skip
FORKED = ()
COUNT = 20  # in batches of 8: of the last one a process has the lesser part
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(Path(__file__).parent.parent),
    "OMP_NUM_THREADS": "1",
    "ACCELERATE_USE_CPU": "true",
}


def launch(arguments, launcher=TORCHRUN) -> subprocess.CompletedProcess[str]:
    if launcher == FORKED:
        words = ["-m", "arrest_hub", "eval", *arguments]
        return run_two(words, env=ENVIRONMENT, cwd=Path(__file__).parent, timeout=240)
    command = [sys.executable, "-m", *launcher, "-m", "arrest_hub", "eval", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, env=ENVIRONMENT)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """An evaluation by one process, and the arguments it had."""
    folder = tmp_path_factory.mktemp("one")
    write_images(folder / "data", count=COUNT)
    write_model(folder / "model")
    arguments = [str(folder / "model"), "--dataset", str(folder / "data"), "--eps", "32/255", "--batch-size", "8",
                 "--attacks", "noise,pgd-5,apgd-ce", "--num-workers", "0", "--no-checks",
                 "--eps-curve", "0:32/255:2", "--teacher", str(folder / "model")]  # fmt: skip
    eval_command([*arguments, "--output-dir", str(folder / "one")])
    return folder, arguments


def same(first: Path, second: Path) -> None:
    verdicts = [read_verdicts(path / "verdicts.parquet") for path in (first, second)]
    assert verdicts[0].index.tolist() == verdicts[1].index.tolist() == list(range(COUNT))
    assert verdicts[0].prediction.tolist() == verdicts[1].prediction.tolist()
    for attack, column in verdicts[0].broken_by.items():
        assert column.tolist() == verdicts[1].broken_by[attack].tolist(), attack
    reports = [read_results(path / "results.json") for path in (first, second)]
    for name in ("results", "teacher_results"):
        rows = [[(row.attack, row.correct, row.n) for row in getattr(report, name)] for report in reports]
        assert rows[0] == rows[1]
    assert reports[0].eps_curve == reports[1].eps_curve
    assert 0 < reports[0].get("robust_accuracy", attack="apgd-ce").correct < COUNT


@pytest.mark.parametrize(
    "launcher",
    [FORKED, pytest.param(TORCHRUN, marks=pytest.mark.slow), pytest.param(ACCELERATE, marks=pytest.mark.slow)],
    ids=["forked", "torchrun", "accelerate"],
)
def test_two_processes_equal_one(one, tmp_path, launcher):
    folder, arguments = one
    result = launch([*arguments, "--output-dir", str(tmp_path / "two")], launcher)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 x CPU" in read_results(tmp_path / "two" / "results.json").hardware
    assert result.stdout.count("attacks     ") == 1, "one process speaks"
    same(folder / "one", tmp_path / "two")


@pytest.mark.slow
def test_one_process_begins_and_two_go_on(one, tmp_path):
    """The journal of a killed run (here: its first lines) is taken up by another number of processes."""
    folder, arguments = one
    out = tmp_path / "out"
    # a whole run, whose journal is caught before it is removed
    code = (
        "import shutil, sys; from arrest_hub import journal, cli; "
        "journal.Journal.remove = lambda self: self.close(); cli.eval_command(sys.argv[1:])"
    )
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parent.parent), OMP_NUM_THREADS="1")
    subprocess.run(
        [sys.executable, "-c", code, *arguments, "--output-dir", str(out)], check=True, env=environment,
        capture_output=True,
    )  # fmt: skip
    for path in (out / "results.json", out / "verdicts.parquet"):
        path.unlink()
    journal = out / "progress" / "rank-00000.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[: len(lines) // 3]) + lines[len(lines) // 3][:20])
    result = launch([*arguments, "--output-dir", str(out), "--resume"])
    assert result.returncode == 0, result.stdout + result.stderr
    same(folder / "one", out)


@pytest.mark.slow
def test_one_clear_error_on_two_processes(one, tmp_path):
    _, arguments = one
    result = launch([*arguments, "--output-dir", str(tmp_path / "out"), "--teacher", str(tmp_path / "none")])
    assert result.returncode != 0
    assert result.stderr.count("error: ") == 1
    assert "none" in result.stderr
    assert "[rank" not in result.stderr


@pytest.mark.slow
def test_two_nodes_that_share_no_disk(one, tmp_path):
    """Each keeps its own journal, under the same relative path; the record is the main one's, which may be another one
    when it goes on. See two_nodes.py."""
    folder, arguments = one
    script = str(Path(__file__).parent / "two_nodes.py")
    command = [sys.executable, "-m", *TORCHRUN, script, str(tmp_path), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout.splitlines()[-1])
    assert said["journals"] == ["out", "out/eval_config.yaml", "out/progress", "out/progress/rank-00001.jsonl"]
    assert said["again"][1] == "AlreadyReported"
    assert "holds an unfinished evaluation" in said["again"][0]
    for name in ("resumed", "complete", "overwritten"):
        assert said[name] == ["done", "done"]
    assert "nothing is left to attack" in result.stdout
    assert said["left"] == ["out", "out/eval_config.yaml"]
    paths = folder / "one", tmp_path / "node-1" / "out"
    first, second = (read_verdicts(path / "verdicts.parquet").broken_by["noise"].tolist() for path in paths)
    assert first == second
