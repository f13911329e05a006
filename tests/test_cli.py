import errno
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from torch.distributed import DistNetworkError, DistStoreError

from arrest_hub import __version__, command
from arrest_hub.cli import eval_parser, finetune_command, finetune_parser, parse_eval, parse_finetune
from arrest_hub.command import leave, run_cli
from arrest_hub.config import FIELDS
from arrest_hub.config_sources import recipe_config
from arrest_hub.errors import ConfigError, Terminated
from arrest_hub.fields import flag
from arrest_hub.push_cli import card_parser, push_parser


def errors(argv, capsys):
    code = run_cli(finetune_command, argv)
    out, err = capsys.readouterr()
    assert code == 2
    assert err.startswith("error: ")
    assert "Traceback" not in out + err
    return err


def test_help_is_quick_and_lists_every_flag():
    started = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-c", "from arrest_hub.cli import finetune_main; finetune_main()", "--help"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert time.perf_counter() - started < 1.0
    assert all(flag(name) in result.stdout for name in FIELDS)


def test_help_imports_no_torch():
    code = (
        "import sys\nfrom arrest_hub.cli import finetune_parser\nfinetune_parser().format_help()\n"
        "sys.exit('torch' in sys.modules or 'timm' in sys.modules or 'datasets' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_misspelt_flag_names_the_nearest(capsys):
    err = errors(["--dataset", "digits", "--epsilon", "8/255"], capsys)
    assert "--epsilon" in err
    assert "--eps" in err
    assert "8/255 is not" not in err, "its value is no second problem"


def test_all_problems_at_once(capsys):
    err = errors(["--dataset", "digits", "--epocs", "3", "--lr", "fast", "--recipe", "quikstart", "stray"], capsys)
    for part in ("'--epochs'", "--lr 'fast'", "'quickstart'", "'stray'"):
        assert part in err
    assert "is missing" not in err, "the recipe would have named a model"


def test_a_misspelt_optimizer_comes_with_the_rest(capsys):
    err = errors(["--dataset", "digits", "--optimizer", "sdg", "--scheduler", "cosin"], capsys)
    assert "'sgd'" in err
    assert "cosine" in err


@pytest.mark.parametrize("name", ["--model", "--dataset"])
def test_a_name_that_no_file_can_have(name, capsys):
    argv = ["--model", "resnet18_cifar", "--dataset", "digits", name, "m" * 300]
    assert "this name of 300 characters: mmm" in errors(argv, capsys)


def test_a_value_behind_a_switch_is_refused_and_not_passed_over(capsys):
    assert "'false' is not a flag" in errors(["--dataset", "digits", "--streaming", "false"], capsys)
    assert "is not a flag" not in errors(["--dataset", "digits", "--streeming", "false"], capsys)
    assert "is not a flag" not in errors(["--dataset", "digits", "--streeming", "digits"], capsys)


def test_missing_value(capsys):
    assert "--eps" in errors(["--eps"], capsys)


def test_abbreviations_are_refused(capsys):
    assert "--batch" in errors(["--dataset", "digits", "--batch", "8"], capsys)


def test_the_datasets_recipe_is_taken_and_said():
    config, notes = parse_finetune(["--dataset", "digits"])
    assert config.recipe == "quickstart"
    assert "quickstart" in notes[0]
    config, notes = parse_finetune(["--dataset", "digits", "--model", "timm/resnet18.a1_in1k"])
    assert config.standard_epochs == 0
    assert any("model_args" in note for note in notes)
    assert config.output_dir != recipe_config("quickstart").output_dir, "a recipe's folder is its own model's"


def test_flags_without_use_are_said():
    _, notes = parse_finetune(["--dataset", "digits", "--method", "at", "--trades-beta", "3", "--standard-lr", "0.1"])
    assert any(note == "not used: --trades-beta (--method is at)" for note in notes)
    _, notes = parse_finetune(["--recipe", "quickstart", "--lr-hold", "0.3", "--scheduler", "constant"])
    assert "not used: --lr-hold (--scheduler is constant)" in notes


def test_model_args_and_switches():
    config, _ = parse_finetune(
        [
            "--model",
            "resnet18_cifar",
            "--dataset",
            "x",
            "--model-args",
            "channels=[4,8,8,8]",
            "drop_rate=0.1",
            "--streaming",
        ]
    )
    assert config.model_args == {"channels": [4, 8, 8, 8], "drop_rate": 0.1}
    assert config.streaming


def test_model_args_without_equals(capsys):
    assert "key=value" in errors(["--model", "resnet18_cifar", "--dataset", "x", "--model-args", "channels"], capsys)


def test_resume_without_a_recipe_flag_takes_the_saved_one(tmp_path, capsys):
    config, _ = parse_finetune(["--recipe", "quickstart", "--eps", "16/255", "--output-dir", str(tmp_path)])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    again, _ = parse_finetune(["--resume", "--output-dir", str(tmp_path)])
    assert (again.eps, again.recipe, again.resume) == ("16/255", "quickstart", True)
    same, _ = parse_finetune(["--recipe", "quickstart", "--eps", "16/255", "--output-dir", str(tmp_path), "--resume"])
    assert same.eps == "16/255"
    err = errors(["--resume", "--output-dir", str(tmp_path), "--eps", "8/255", "--lr", "7"], capsys)
    assert "--eps is 8/255" in err
    assert "--lr is 7" in err
    named, _ = parse_finetune(["--recipe", "quickstart", "--output-dir", str(tmp_path), "--resume"])
    assert named.eps == "16/255", "what was typed then and is not now stays"
    (tmp_path / "moved" / "runs").mkdir(parents=True)
    shutil.copy(tmp_path / "config.yaml", tmp_path / "moved" / "runs")
    (tmp_path / "mine.yaml").write_text(f"model: resnet18\ndataset: digits\noutput_dir: {tmp_path}/moved/runs\n")
    mine = ["--recipe", str(tmp_path / "mine.yaml")]
    begun, _ = parse_finetune([*mine, "--method", "trades", "--trades-beta", "3"])
    (tmp_path / "moved" / "runs" / "config.yaml").write_text(replace(begun, output_dir="/elsewhere").to_yaml())
    found, notes = parse_finetune([*mine, "--trades-beta", "3", "--resume"])
    assert (found.method, found.output_dir) == ("trades", f"{tmp_path}/moved/runs"), "where it was found"
    assert [note.partition(" the")[0] for note in notes] == ["resuming with"]
    err = errors(["--recipe", "cifar10_resnet18", "--output-dir", str(tmp_path), "--resume"], capsys)
    assert "--recipe is cifar10_resnet18 but the run to resume has quickstart" in err


@pytest.mark.parametrize("words", [[], ["--recipe", "quickstart"]])
def test_resume_and_overwrite_contradict_each_other_whether_or_not_there_is_a_run(words, tmp_path, capsys):
    both = [*words, "--dataset", "digits", "--output-dir", str(tmp_path), "--resume", "--overwrite"]
    assert "contradict each other" in errors(both, capsys)
    config, _ = parse_finetune(["--recipe", "quickstart", "--output-dir", str(tmp_path)])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert "contradict each other" in errors(both, capsys)


def test_module_entry_point_names_its_commands():
    result = subprocess.run(
        [sys.executable, "-m", "arrest_hub", "finetun"],
        capture_output=True,
        text=True,
        check=False,
        env=dict(os.environ),
    )
    assert result.returncode == 2
    assert "finetune" in result.stderr


@pytest.mark.parametrize("rank", ["1", "3"])
def test_only_the_first_process_of_a_machine_reports_a_bad_configuration(rank, capsys, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    assert run_cli(finetune_command, ["--epocs", "3"]) == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("LOCAL_RANK", "0")  # of a machine, which alone may be wrong
    assert run_cli(finetune_command, ["--epocs", "3"]) == 2
    assert capsys.readouterr().err.count("error: ") == 1


def test_models_behind_flags_are_taken_and_short_flags_are_not_passed_over():
    assert [config.model for config in parse_eval(["a/export", "--dataset", "digits", "b/export"])] == [
        "a/export",
        "b/export",
    ]
    with pytest.raises(ConfigError, match="unknown flag") as caught:
        parse_eval(["m", "--dataset", "digits", "-seed", "--epz=1/255"])
    assert len(caught.value.problems) == 2


def test_exit_codes_of_what_ends_a_run(capsys):
    def ends(error):
        def main(argv):
            raise error

        return run_cli(main, [])

    assert ends(Terminated("stopped by SIGTERM at step 3")) == 143
    assert "stopped by SIGTERM at step 3" in capsys.readouterr().err
    assert ends(Terminated("stopped by Ctrl-C at step 3", 130)) == 130
    assert "stopped by Ctrl-C" in capsys.readouterr().err
    assert ends(OSError(errno.ENOSPC, "No space left on device", "a.png", None, "export/a.png")) == 2
    assert "at export/a.png" in capsys.readouterr().err, "the copy's target is what is full"
    assert ends(OSError(errno.ENOSPC, "No space left on device", "runs/x/log.jsonl")) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: No space left on device at runs/x/log.jsonl.")
    assert "--resume" in message
    with pytest.raises(FileNotFoundError):
        ends(FileNotFoundError(errno.ENOENT, "No such file"))


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:47\n GLHF!"), True),
        (DistStoreError("wait timeout after 20000ms"), True),
        (DistNetworkError("The server socket has failed to listen on any local network address. EADDRINUSE"), False),
        (RuntimeError("Broken pipe while reading image 7"), False),
        (RuntimeError("shapes"), False),
    ],
)
def test_a_process_whose_peer_is_gone_says_so_in_a_line(error, lost, monkeypatch, capsys):
    def main(argv):
        raise error

    with pytest.raises(RuntimeError):  # of one process it would mean something else
        run_cli(main, [])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    if not lost:
        with pytest.raises(RuntimeError, match=str(error)[:20]):
            run_cli(main, [])
        return
    assert run_cli(main, []) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: process 1: another process of the run ended, or did not answer in time (")
    assert message.count("\n") == 1
    assert "--resume" in message


@pytest.mark.parametrize("processes", [1, 2])
def test_one_of_several_processes_ends_without_taking_the_interpreter_down(processes):
    """What is registered for the end still happens, and so does what other threads have in hand."""
    code = """
import atexit, threading, time
from concurrent.futures import ThreadPoolExecutor
from arrest_hub.command import leave

class AtTheVeryEnd:
    def __del__(self):
        print("taken down")

held = AtTheVeryEnd()
atexit.register(print, "atexit")
ThreadPoolExecutor(1).submit(lambda: (time.sleep(0.2), print("thread")))
print("unflushed", end=" ")
leave(7)
"""
    environment = dict(os.environ, WORLD_SIZE=str(processes))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (7, "")
    expected = ["unflushed", "thread", "atexit"] + ["taken", "down"] * (processes == 1)
    assert done.stdout.split() == expected


@pytest.mark.parametrize(("rank", "code", "waits"), [("0", 2, False), ("1", 2, True), ("1", 0, False)])
def test_the_process_that_says_what_is_wrong_ends_first(rank, code, waits, monkeypatch):
    """Its launcher would kill it before."""
    waited, ended = [], []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(command.time, "sleep", waited.append)
    monkeypatch.setattr(command.threading, "_shutdown", lambda: None)
    monkeypatch.setattr(command.atexit, "_run_exitfuncs", lambda: None)

    def end(code):
        ended.append(code)
        raise SystemExit(code)

    monkeypatch.setattr(command.os, "_exit", end)
    with pytest.raises(SystemExit):
        leave(code)
    assert (ended, bool(waited)) == ([code], waits)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_run_outlives_the_reader_of_its_output(stream, tmp_path):
    """As of `| head`."""
    code = f"""
import sys
from arrest_hub.command import run_cli
def main(argv):
    for _ in range(3):
        print("x" * 100_000, file=sys.{stream})
    open({str(tmp_path / "done")!r}, "w").close()
sys.exit(run_cli(main, []))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    read, other = (process.stdout, process.stderr)[:: 1 if stream == "stdout" else -1]
    read.read(1)
    read.close()
    assert other.read() == b""
    assert process.wait(60) == 0
    assert (tmp_path / "done").exists()


def test_a_run_without_streams(tmp_path):
    """As after `>&- 2>&-`."""
    code = (
        "import sys\nfrom arrest_hub.command import run_cli\nsys.stdout = sys.stderr = None\n"
        "def main(argv):\n    print('x', file=sys.stderr)\n"
        "sys.exit(run_cli(main, []) or 7 * (sys.stdout is None))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 7


@pytest.mark.parametrize("parser", [finetune_parser, eval_parser, push_parser, card_parser])
def test_version(parser, capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        parser().parse_args(["--version"])
    assert capsys.readouterr().out == f"arrest-hub {__version__}\n"
