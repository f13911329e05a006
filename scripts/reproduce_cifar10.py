"""The evidence of docs/results.md, from nothing: a standardly trained teacher, ARREST and what it is compared with,
AutoAttack, tables and figures. Every figure is one of arrest-eval's, kept in docs/evidence/ with its commands.

    python scripts/reproduce_cifar10.py --suite resnet18                     # ARREST alone, AutoAttack on 10,000 images
    python scripts/reproduce_cifar10.py --suite narrow --runs all --jobs 2   # every variant, on a CPU
    python scripts/reproduce_cifar10.py --suite resnet18 --minutes 9         # as far as nine minutes go; again: go on
    python scripts/reproduce_cifar10.py --teacher ./my-resnet18              # from a network that is trained already
    python scripts/reproduce_cifar10.py --report                             # tables and figures alone

Each step is a run of arrest-finetune or arrest-eval, resumed where one was stopped and left out where its results are
kept. Exit code 3: time is up, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cifar10_report import write_report
from cifar10_suites import METHOD, SUITES, VARIANTS, Flags, Suite, Variant

from arrest_hub.fields import flag

ROOT = Path(__file__).parent.parent
EVIDENCE = ROOT / "docs" / "evidence"
STAGES = ("train", "pgd", "apgd", "autoattack")
EVALUATIONS = {
    "pgd": {"attacks": "clean,pgd-20"},
    # AutoAttack's first two, on what PGD leaves: the worst case so far, at a quarter of AutoAttack's time
    "apgd": {"attacks": "clean,pgd-20,apgd-ce,apgd-t", "cascade": True},
    "autoattack": {"attacks": "clean,pgd-20,autoattack"},
}
"""What a stage tells arrest-eval; each has the figures of those before it."""
KEPT = ("step", "loss", "clean_accuracy", "adversarial_accuracy", "drift_p50", "drift_p90", "replay_rate", "distance",
        "cross_entropy", "attack_steps", "lr")  # fmt: skip
UNFINISHED = 3


class TimeIsUp(Exception):
    """The deadline came before a command's end; what it did is kept."""


@dataclass
class Session:
    """What all steps share."""

    suite: Suite
    name: str
    dataset: str
    folder: Path
    deadline: float | None
    attacks: tuple[str, ...] = ("pgd",)
    """The stages whose figures are wanted: a run that has them all kept is not trained again."""
    teacher: Path | None = None
    """A standardly pretrained network to start from, in place of one trained here."""

    def call(self, command: Sequence[str], log: Path) -> float:
        """Run a command of arrest-hub and wait: the seconds it took. At the deadline it is told to stop.

        Raises:
            TimeIsUp: it was stopped.
            SystemExit: it failed.
        """
        if self.deadline is not None and time.time() > self.deadline - 15:
            raise TimeIsUp
        log.parent.mkdir(parents=True, exist_ok=True)
        began = time.time()
        with log.open("a") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "arrest_hub", *command], stdout=output, stderr=subprocess.STDOUT, cwd=ROOT
            )
            try:
                code = process.wait(None if self.deadline is None else max(1.0, self.deadline - time.time()))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGTERM)
                process.wait()
                raise TimeIsUp from None
            except BaseException:
                process.terminate()
                raise
        if code:
            tail = "".join(log.read_text().splitlines(keepends=True)[-15:])
            raise SystemExit(f"{' '.join(command)}\nended with code {code}; the end of {log}:\n{tail}")
        return time.time() - began


def words(flags: Flags) -> list[str]:
    """Flags as they are typed."""
    result: list[str] = []
    for name, value in flags.items():
        result += [flag(name)] if value is True else [flag(name), str(value)]
    return result


def teacher_folder(session: Session) -> Path:
    """The teacher's model folder; trained first, where it is not there and none was given."""
    if session.teacher is not None:
        return session.teacher
    run = session.folder / "teacher"
    if not (run / "teacher").is_dir() or not (run / "export" / "results.json").is_file():
        # the clean phase is what is wanted, and one robust step ends the run
        flags = session.suite.model | {
            "dataset": session.dataset, "recipe": session.suite.recipe, "mixed_precision": "bf16", "epochs": 1,
            "max_steps": 1, "validation_size": 0, "limit_eval": 100, "output_dir": run,
        } | session.suite.teacher  # fmt: skip
        resume = ["--resume"] if (run / "config.yaml").is_file() else []
        print("teacher: standard training", flush=True)
        session.call(["finetune", *words(flags), "--no-figures", *resume], run.parent / "teacher.log")
    return run / "teacher"


def run_name(key: str, seed: int) -> str:
    """Of a variant and a seed."""
    return f"{key}-seed-{seed}"


def finetune_flags(session: Session, variant: Variant, seed: int, run: Path) -> Flags:
    """What arrest-finetune is told for one run."""
    return {
        "model": session.teacher or session.folder / "teacher" / "teacher",
        "dataset": session.dataset, "recipe": session.suite.recipe, "standard_epochs": 0,
        **session.suite.budget, **METHOD, **variant.flags, "seed": seed, "validation_size": 0, "eval_every": 0,
        "export_weights": "last", "limit_eval": 100, "log_every": 20, "output_dir": run,
    }  # fmt: skip


def train(session: Session, key: str, seed: int) -> None:
    """One run of arrest-finetune, unless its weights or its results are there."""
    run = session.folder / run_name(key, seed)
    kept = all(has_figure(session, key, seed, stage) for stage in session.attacks)
    if (run / "export" / "results.json").is_file() or kept:
        return
    flags = finetune_flags(session, VARIANTS[key], seed, run)
    resume = ["--resume"] if (run / "config.yaml").is_file() else []
    session.call(["finetune", *words(flags), "--no-figures", *resume], session.folder / f"{run.name}.log")


def attack(session: Session, key: str, seed: int, stage: str) -> None:
    """One run of arrest-eval, unless its figures are kept, and keep them."""
    if has_figure(session, key, seed, stage):
        return
    run = session.folder / run_name(key, seed)
    if not (run / "export" / "results.json").is_file():
        raise SystemExit(f"{run} has no weights to attack: put train among the --stages")
    record = session.folder / "evals" / f"{run.name}-{stage}"
    flags = session.suite.evaluation | {"dataset": session.dataset, "seed": 0, "output_dir": record}
    flags |= EVALUATIONS[stage]
    resume = ["--resume"] if record.is_dir() else []
    command = ["eval", str(run / "export"), *words(flags), "--teacher", "none", "--no-checks", "--no-figures",
               "--no-update-export"]  # fmt: skip
    session.call([*command, *resume], session.folder / f"{run.name}.log")
    keep(session, key, seed, run, record, command)


def keep(session: Session, key: str, seed: int, run: Path, record: Path, command: Sequence[str]) -> None:
    """Copy what was measured, and how, to where it is committed."""
    folder = evidence_folder(session, key, seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("results.json", "verdicts.parquet"):  # the second: of each image, for networks in pairs
        shutil.copyfile(record / name, folder / name)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    log = [line for line in lines if line["phase"] == "robust" and "loss" in line]
    seconds = read_seconds(run)
    speed = len(log) / sum(1 / line["images_per_second"] for line in log)
    finetune = ["finetune", *words(finetune_flags(session, VARIANTS[key], seed, run)), "--no-figures"]
    facts = {
        "commands": [portable(session, finetune), portable(session, command)],
        "train_minutes": round(seconds / 60, 3), "images_per_second": round(speed, 2),
        "passes": read_passes(session.folder / f"{run.name}.log"),
        "hardware": json.loads((run / "export" / "training_record.json").read_text())["hardware"],
        "log": [{name: round(line[name], 5) for name in KEPT if name in line} for line in log],
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def portable(session: Session, command: Sequence[str]) -> str:
    """A command as anybody types it, from the repository's root."""
    kinds = {"finetune": "arrest-finetune", "eval": "arrest-eval"}
    text = " ".join([kinds[command[0]], *(f"'{word}'" if "[" in word else word for word in command[1:])])
    if session.teacher is not None:
        inside = session.teacher.is_relative_to(ROOT)
        shown = session.teacher.relative_to(ROOT) if inside else f"./{session.teacher.name}"
        text = text.replace(str(session.teacher), str(shown))
    return text.replace(str(session.folder), f"runs/{session.name}").replace(session.dataset, "cifar10")


def read_seconds(run: Path) -> float:
    """Seconds of the robust training, from its newest checkpoint."""
    folders = sorted((run / "checkpoints").glob("step-*"), key=lambda folder: folder.stat().st_mtime)
    return float(json.loads((folders[-1] / "progress.json").read_text())["seconds"])


def read_passes(log: Path) -> str:
    """The line that says how many passes an image costs in a step."""
    lines = [line for line in log.read_text().splitlines() if line.startswith("passes ")]
    return lines[-1].partition(": ")[2] if lines else ""


def evidence_folder(session: Session, key: str, seed: int) -> Path:
    """Where a run's figures are kept."""
    return EVIDENCE / session.name / run_name(key, seed)


def has_figure(session: Session, key: str, seed: int, stage: str) -> bool:
    """Whether the figures of a stage are kept already."""
    path = evidence_folder(session, key, seed) / "results.json"
    if not path.is_file():
        return False
    attacks = {result["attack"] for result in json.loads(path.read_text())["results"]}
    return bool(attacks & {"pgd": {"pgd-20"}, "apgd": {"apgd-t", "autoattack"}, "autoattack": {"autoattack"}}[stage])


def chosen_runs(text: str) -> list[tuple[str, int]]:
    """``all``, a group, or names of variants (``best``) or runs (``best-seed-1``) separated by commas.

    Raises ValueError for anything else.
    """
    every = [(key, seed) for seed in (0, 1, 2) for key, variant in VARIANTS.items() if seed in variant.seeds]
    found: list[tuple[str, int]] = []
    for word in text.split(","):
        some = [
            run for run in every if word in ("all", run[0], VARIANTS[run[0]].group, run_name(*run))
        ]  # fmt: skip
        if not some:
            raise ValueError(f"--runs {word!r} is no variant, group or run. Variants: {', '.join(VARIANTS)}")
        found += [run for run in some if run not in found]
    return found


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=tuple(SUITES), default="resnet18")
    parser.add_argument("--runs", default="best-seed-0", help="all, a group, or variants or runs separated by commas")
    parser.add_argument(
        "--stages",
        default="train,pgd,autoattack",
        help="of train, pgd, apgd (the first half of AutoAttack), autoattack",
    )
    parser.add_argument("--dataset", default="cifar10", help="cifar10, or a folder that holds it")
    parser.add_argument(
        "--teacher", type=Path, help="a pretrained network's folder, to start from in place of training one"
    )
    parser.add_argument("--output-dir", type=Path, help="where the runs are; default: runs/<suite>")
    parser.add_argument("--minutes", type=float, help="stop after so many, with everything kept")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; more than one: a thread each, for a CPU")
    parser.add_argument("--report", action="store_true", help="write docs/results.md and its figures, and nothing else")
    args = parser.parse_args(argv)
    try:
        args.chosen = chosen_runs(args.runs)
    except ValueError as error:
        parser.error(str(error))
    if args.teacher is not None and not (args.teacher / "config.json").is_file():
        parser.error(
            f"--teacher {args.teacher} is no model folder (no config.json): give the folder of a trained network"
        )
    attacks = args.stages != "train" and not args.report
    if attacks and SUITES[args.suite].evaluation.get("attack_precision") == "tf32" and not torch.cuda.is_available():
        parser.error(
            f"--suite {args.suite} attacks in TF32 and this machine offers no NVIDIA GPU: give --stages train, or "
            "another suite, such as resnet18_cpu"
        )
    if unknown := set(args.stages.split(",")) - set(STAGES):
        parser.error(f"--stages {', '.join(sorted(unknown))}: give of {', '.join(STAGES)}")
    return args


def main() -> int:
    args = parse()
    if args.report:
        write_report(EVIDENCE, ROOT / "docs")
        return 0
    deadline = None if args.minutes is None else time.time() + 60 * args.minutes
    folder = (args.output_dir or Path("runs") / args.suite).resolve()
    attacks = tuple(stage for stage in args.stages.split(",") if stage != "train") or ("pgd",)
    teacher = args.teacher.resolve() if args.teacher else None
    session = Session(SUITES[args.suite], args.suite, args.dataset, folder, deadline, attacks, teacher)
    if args.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = "1"  # threads of several processes would wait for each other
    steps: list[tuple[Any, ...]] = [
        (attack, key, seed, stage) if stage != "train" else (train, key, seed)
        for stage in STAGES if stage in args.stages.split(",") for key, seed in args.chosen
    ]  # fmt: skip
    try:
        teacher_folder(session)
        with ThreadPoolExecutor(args.jobs) as pool:
            for stage in STAGES:  # a stage is complete before the next begins
                some = [step for step in steps if (step[3] if len(step) == 4 else "train") == stage]
                list(pool.map(lambda step: run_step(session, step), some))
    except TimeIsUp:
        print("time is up: give the same command again to go on")
        return UNFINISHED
    write_report(EVIDENCE, ROOT / "docs")
    return 0


def run_step(session: Session, step: tuple[Any, ...]) -> None:
    """One step of the way, said when it is done."""
    began = time.time()
    step[0](session, *step[1:])
    if time.time() - began > 1:
        name = f"{run_name(*step[1:3])}: {'train' if len(step) == 3 else step[3]}"
        print(f"{time.strftime('%H:%M:%S')} {name} in {(time.time() - began) / 60:.1f} min", flush=True)


if __name__ == "__main__":
    sys.exit(main())
