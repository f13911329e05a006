"""Two hosts, a node that dies, and the same weights in the end.

    sudo python scripts/two_hosts.py

Makes two hosts out of network namespaces joined by a cable (a veth pair), trains on both with `accelerate launch`,
pulls the cable and kills everything on one of them in the middle of an epoch, waits for the other to notice, starts
both again with --resume, and compares the weights with those of an uninterrupted run of two processes on one host:
they must be equal bit for bit. Needs root and Linux's `ip`; where it has not got them it says so and ends with code 0.
Takes about two minutes.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

REPOSITORY = Path(__file__).parent.parent
ADDRESSES = ("10.213.77.1", "10.213.77.2")
HOSTS = tuple(f"arrest{os.getpid() % 10000}{letter}" for letter in "ab")
CABLE = tuple(f"veth{os.getpid() % 10000}{letter}" for letter in "ab")
TRAINING = [
    *("--recipe", "quickstart", "--standard-epochs", "1", "--epochs", "2", "--batch-size", "32", "--attack-steps", "3"),
    *("--eval-attack-steps", "2", "--limit-train", "384", "--limit-eval", "40", "--num-workers", "1", "--no-figures"),
    *("--checkpoint-every", "2", "--log-every", "1", "--ddp-timeout", "20"),
]
"""An epoch of six steps: the checkpoint at step 8 lies in the middle of the second."""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def missing_rights() -> str | None:
    """Why namespaces cannot be made here; None: they can."""
    if shutil.which("ip") is None:
        return "there is no `ip` on this machine"
    try:
        ip("netns", "add", HOSTS[0])
        ip("link", "add", CABLE[0], "type", "veth", "peer", "name", CABLE[1])
    except subprocess.CalledProcessError as error:
        return f"no network namespaces can be made here ({error.stderr.strip()})"
    finally:
        remove_hosts()
    return None


def make_hosts() -> None:
    ip("link", "add", CABLE[0], "type", "veth", "peer", "name", CABLE[1])
    for host, device, address in zip(HOSTS, CABLE, ADDRESSES, strict=True):
        ip("netns", "add", host)
        ip("link", "set", device, "netns", host)
        ip("-n", host, "addr", "add", f"{address}/24", "dev", device)
        ip("-n", host, "link", "set", device, "up")
        ip("-n", host, "link", "set", "lo", "up")


def remove_hosts() -> None:
    for words in (("link", "del", CABLE[0]), *(("netns", "del", host) for host in HOSTS)):
        subprocess.run(["ip", *words], check=False, capture_output=True)


def start(output: Path, log: Path, *, rank: int | None = None, resume: bool = False) -> subprocess.Popen[bytes]:
    """The launcher of one host with one process (``rank``), or of two processes on this one."""
    launcher = [str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file"]
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(REPOSITORY))
    if rank is None:
        command = [*launcher, str(REPOSITORY / "recipes/accelerate/cpu.yaml")]
    else:
        command = [
            "ip",
            "netns",
            "exec",
            HOSTS[rank],
            *launcher,
            str(REPOSITORY / "recipes/accelerate/multi_node.yaml"),
        ]
        command += ["--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank)]
        command += ["--main_process_ip", ADDRESSES[0]]
        environment["GLOO_SOCKET_IFNAME"] = CABLE[rank]
    command += ["-m", "arrest_hub", "finetune", *TRAINING, "--output-dir", str(output), *["--resume"] * resume]
    return subprocess.Popen(
        command, env=environment, stdout=log.open("ab"), stderr=subprocess.STDOUT, start_new_session=True
    )


def finish(processes: list[subprocess.Popen[bytes]], what: str, seconds: float = 300) -> None:
    until = time.monotonic() + seconds
    for process in processes:
        if process.wait(max(1, until - time.monotonic())):
            raise SystemExit(f"{what} ended with code {process.returncode}")
    print(f"{what}: done", flush=True)


def kill(process: subprocess.Popen[bytes], rank: int) -> None:
    """As when a machine loses power: no process on it has time for a last word, and none of its packets leaves."""
    ip("-n", HOSTS[rank], "link", "set", CABLE[rank], "down")
    found = subprocess.run(["ip", "netns", "pids", HOSTS[rank]], check=True, capture_output=True, text=True)
    for pid in map(int, found.stdout.split()):
        os.kill(pid, signal.SIGKILL)
    process.wait()


def compare(folder: Path) -> list[str]:
    """The names of the files of weights that are not the same."""
    names = ["teacher/model.safetensors", "checkpoints/last/model.safetensors", "export/model.safetensors"]
    different = []
    for name in names:
        a, b = (load_file(folder / run / name) for run in ("one-host", "two-hosts"))
        if a.keys() != b.keys() or not all(torch.equal(a[key], b[key]) for key in a):
            different.append(name)
    return different


def train_on_two_hosts(folder: Path) -> None:
    run = folder / "two-hosts"
    logs = [folder / f"host-{rank}.log" for rank in (0, 1)]
    nodes = [start(run, logs[rank], rank=rank) for rank in (0, 1)]
    while not (run / "checkpoints" / "step-000008").is_dir():
        if any(node.poll() is not None for node in nodes):
            raise SystemExit("a node ended before the checkpoint in the middle of the second epoch")
        time.sleep(0.01)
    kill(nodes[1], 1)
    print("node 1 is dead after step 8, in the middle of an epoch", flush=True)
    killed = time.monotonic()
    if not nodes[0].wait(120):
        raise SystemExit("node 0 ended as if nothing had happened")
    print(f"node 0 noticed, and ended, {time.monotonic() - killed:.0f} s later", flush=True)
    if (run / "export").exists():
        raise SystemExit("the run had already finished: nothing was tested")
    ip("-n", HOSTS[1], "link", "set", CABLE[1], "up")
    nodes = [start(run, logs[rank], rank=rank, resume=True) for rank in (0, 1)]
    finish(nodes, "both nodes, started again with --resume")
    said = logs[0].read_text(errors="replace")
    print(next(line for line in said.splitlines() if line.startswith("resuming from")), flush=True)


def main() -> None:
    why = missing_rights()
    if why:
        print(f"two hosts: SKIPPED: {why}. Run it as root on Linux.")
        return
    folder = Path(tempfile.mkdtemp(prefix="two-hosts-"))
    try:
        finish([start(folder / "one-host", folder / "one-host.log")], "two processes on one host, uninterrupted")
        make_hosts()
        train_on_two_hosts(folder)
        different = compare(folder)
        print("the weights are " + ("EQUAL, bit for bit" if not different else f"NOT EQUAL: {', '.join(different)}"))
        if different:
            raise SystemExit(1)
    except BaseException:
        for log in sorted(folder.glob("*.log")):
            print(f"--- the end of {log.name}:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-25:]))
        raise
    finally:
        for host in HOSTS:
            found = subprocess.run(["ip", "netns", "pids", host], check=False, capture_output=True, text=True)
            for pid in map(int, found.stdout.split()):
                os.kill(pid, signal.SIGKILL)
        remove_hosts()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
