"""Imports point down only: the plan of the house, held by a test."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "arrest_hub"
LEVELS = [
    {"errors", "files", "command", "fields", "licenses", "attack_schedule", "config", "config_sources", "eval_config",
     "push_config", "recipe_files", "training_record", "model_arguments"},
    {"transforms", "images", "columns", "subsets", "seeding", "caller", "corrupt", "streams", "data_speed", "on_demand",
     "image_folder", "folder_checks", "labelled_source",
     "sources", "splits", "labels", "data", "architectures", "model_config", "model_source", "image_processor",
     "heads", "networks", "backbones", "network_options", "folding",
     "attacks", "autoattack", "objective", "sample_eps", "weight_perturbation", "results", "verdicts", "throughput",
     "figures", "training_figure", "sharding", "guards", "progress",
     "processes", "machine", "stopping", "out_of_memory", "tf32"},
    {"arrest", "baselines", "checkpoint", "export", "card_facts", "model_card", "comparison", "robustbench", "journal",
     "hub_access", "hub_search", "pushed_files", "hub_repository", "hub", "pretrained"},
    {"validation", "provenance", "run_folder", "prepare", "run", "loop_guards", "resume", "schedule", "step",
     "epoch_batches", "epoch_validation", "loop",
     "finish", "estimate", "plan", "train", "evaluator", "attack_stages", "masking", "evidence",
     "trained_on", "eval_subjects", "eval_record", "eval_identity", "eval_session", "evaluation"},
    {"cli", "push_cli", "__main__"},
]  # fmt: skip
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
MATHS = (
    "folding",
    "attack_schedule",
    "attacks",
    "autoattack",
    "arrest",
    "baselines",
    "objective",
    "sample_eps",
    "weight_perturbation",
    "attack_stages",
    "masking",
)
NO_TORCH = ("errors", "files", "command", "fields", "attack_schedule", "config", "config_sources", "eval_config",
            "recipe_files", "results", "verdicts", "figures", "training_figure", "comparison", "robustbench",
            "licenses", "training_record", "push_config", "model_arguments", "card_facts", "hub_access", "hub_search",
            "pushed_files", "hub_repository", "hub", "cli", "push_cli", "model_card", "__main__")  # fmt: skip


def imports(name, late=False):
    """Modules imported when the file is, or (late) anywhere in it."""
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    nodes = ast.walk(tree) if late else tree.body
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def modules():
    return sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def test_every_module_has_its_place():
    assert set(modules()) == set(LEVEL)


def own_imports(name):
    found = {module.split(".")[1] for module in imports(name, late=True) if module.startswith("arrest_hub.")}
    return found - {"recipes", "model_cards"}


@pytest.mark.parametrize("name", modules())
def test_imports_point_down(name):
    assert not [other for other in own_imports(name) if LEVEL[other] > LEVEL[name]]


def test_no_cycles():
    TopologicalSorter({name: own_imports(name) for name in modules()}).prepare()


@pytest.mark.parametrize("name", MATHS)
def test_maths_knows_no_config(name):
    assert not any(module.startswith("arrest_hub.config") for module in imports(name, late=True))


@pytest.mark.parametrize("name", NO_TORCH)
def test_no_torch_at_import(name):
    heavy = {"torch", "torchvision", "timm", "datasets", "accelerate", "transformers"}
    assert not heavy & {module.split(".")[0] for module in imports(name)}
