"""The README's commands parse, its set-up commands are two, and what it names exists. CI runs the rest."""

import re
import shlex
from pathlib import Path

import pretrained_resnet18
import pytest

from arrest_hub.cli import parse_eval, parse_finetune
from arrest_hub.config import FIELDS
from arrest_hub.eval_config import EVAL_FIELDS
from arrest_hub.fields import flag
from arrest_hub.push_cli import parse_card, parse_push
from arrest_hub.push_config import CARD_FIELDS, PUSH_FIELDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BASH = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines() if line]


def test_exactly_two_setup_commands():
    assert sum(line.startswith("python3 -m venv .venv && ") for line in BASH) == 2


@pytest.mark.parametrize("command", [line for line in BASH if not line.startswith("python3")])
def test_commands_parse(command):
    words = shlex.split(command)
    if words[:2] == ["accelerate", "launch"]:
        words = words[words.index("arrest_hub") + 1 :]
        words[0] = "arrest-" + words[0]
    if words[:2] == ["python", "scripts/pretrained_resnet18.py"]:
        assert pretrained_resnet18.parse(words[2:]).output_dir == Path(
            "resnet18_cifar10"
        )  # it is run in test_reproduce
        return
    if words[0] in ("arrest-push", "arrest-card"):
        assert {"arrest-push": parse_push, "arrest-card": parse_card}[words[0]](words[1:]).folder
        return
    configs = {"arrest-finetune": lambda argv: [parse_finetune(argv)[0]], "arrest-eval": parse_eval}[words[0]](
        words[1:]
    )
    for config in configs:
        assert config.model
        assert config.dataset


def test_flags_that_the_docs_name_exist():
    fields = FIELDS | EVAL_FIELDS | PUSH_FIELDS | CARD_FIELDS
    known = {flag(name) for name in fields} | {"--help", "--no-channels-last", "--no-checks", "--no-figures"}
    # the launchers', and those of the scripts that docs/scaling.md names
    known |= {"--nproc_per_node", "--num_processes", "--config_file", "--num_machines", "--main_process_ip"}
    known |= {"--machine_rank", "--nodes", "--gpus-per-node", "--steps", "--processes", "--models", "--repeats"}
    known |= {
        "--options",
        "--peers",
        "--output",
        "--images",
        "--at-least",
        "--seeds",
        "--report",
        "--suite",
        "--minutes",
        "--runs",
        "--jobs",
        "--stages",
        "--tricks",
        "--emulate",
        "--no-direct",
        "--variants",
        "--without",
        "--all-attack-steps",
        "--batch-sizes",
    }
    for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        assert set(re.findall(r"--[a-z][a-z_-]+", path.read_text())) <= known | {"---"}, path


def test_the_parts_alone_are_used_as_the_docs_say():
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/method.md").read_text(), re.DOTALL)
    exec(example, {})


def test_links_lead_somewhere():
    for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{path}: {target}"


def test_defaults_in_the_docs_are_the_defaults():
    text = (ROOT / "docs/method.md").read_text()
    from arrest_hub.config import FinetuneConfig

    config = FinetuneConfig()
    assert f"| `--rgkd-weight` (0: off) | {config.rgkd_weight:g} |".strip("| ") in text
    assert f"(none: off) | {config.replay_threshold:g} |" in text
    assert f"| {config.eps}, {config.norm} |" in text
