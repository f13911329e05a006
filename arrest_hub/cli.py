"""The command line: flags -> configuration -> work. Everything heavy is imported after the flags are known good."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from arrest_hub import __version__
from arrest_hub.command import leave, parting, run_cli
from arrest_hub.config import GROUPS, MODEL_KEYS, FinetuneConfig
from arrest_hub.config_sources import load_config, resolve, resume_config, unknown_key, unused_flags
from arrest_hub.errors import ConfigError
from arrest_hub.eval_config import EVAL_FIELDS, EvalConfig, evaluation_name, unknown_eval_key
from arrest_hub.eval_config import GROUPS as EVAL_GROUPS
from arrest_hub.fields import flag
from arrest_hub.recipe_files import list_recipes, read_recipe, recipe_for_dataset
from arrest_hub.robustbench import robustbench_problems

EPILOG = """\
examples:
  arrest-finetune --recipe quickstart
  arrest-finetune --model timm/resnet50.a1_in1k --dataset imagenet
  arrest-finetune --model ./my-model --dataset ./my-images --standard-epochs 3 --eps 4/255
  accelerate launch --num_processes 2 -m arrest_hub finetune --recipe cifar10_resnet18

recipes: {recipes}
A flag beats the recipe, the recipe beats the default. Without --recipe, the dataset's own is taken."""


EVAL_EPILOG = """\
examples:
  arrest-eval runs/mine/export --dataset cifar10 --eps 8/255
  arrest-eval timm/resnet50.a1_in1k --dataset imagenet --attacks clean,pgd-20,autoattack --limit-eval 5000
  arrest-eval runs/a/export runs/b/export --dataset cifar10 --attacks clean,pgd-20
  accelerate launch --num_processes 8 -m arrest_hub eval someone/model --dataset imagenet --attacks autoattack

Several models are put side by side in comparison.md and comparison.json."""


class Parser(argparse.ArgumentParser):
    """Raises ConfigError instead of exiting, so that all problems are reported together."""

    def error(self, message: str) -> Any:
        if "expected one argument" in message:  # also what argparse makes of -1/255
            message += ": give a value behind it that does not begin with a hyphen."
        raise ConfigError(message)


def finetune_parser() -> argparse.ArgumentParser:
    """One flag for each field of FinetuneConfig, in its groups; every value arrives as text and is converted later."""
    parser = Parser(
        prog="arrest-finetune",
        description="Make a pretrained image classifier robust to adversarial examples, keeping its clean accuracy.",
        epilog=EPILOG.format(recipes=", ".join(list_recipes())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_fields(parser, FinetuneConfig, GROUPS)
    return parser


def eval_parser() -> argparse.ArgumentParser:
    """One flag for each field of EvalConfig, and the models without a flag."""
    parser = Parser(
        prog="arrest-eval",
        description="Measure how robust image classifiers are to adversarial examples, with the evidence for it.",
        epilog=EVAL_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help=EVAL_FIELDS["model"].metadata["help"])
    add_fields(parser, EvalConfig, EVAL_GROUPS, leave_out=("model",))
    return parser


def add_fields(
    parser: argparse.ArgumentParser, config: type, groups: Sequence[str], leave_out: Sequence[str] = ()
) -> None:
    """A flag for each field of a configuration, in its group, and --version."""
    parser.add_argument("--version", action="version", version=f"arrest-hub {__version__}")
    used = {field.metadata["group"] for field in dataclasses.fields(config) if field.name not in leave_out}
    sections = {name: parser.add_argument_group(name) for name in groups if name in used}
    for field in dataclasses.fields(config):
        if field.name in leave_out:
            continue
        meta = field.metadata
        help_text = meta["help"]
        options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
        if meta["kind"] == "bool":
            options["action"] = argparse.BooleanOptionalAction
        elif meta["kind"] == "mapping":
            options |= {"nargs": "+", "metavar": "KEY=VALUE"}
        else:
            names = {"int": "N", "float": "X", "fraction": "A/B", "str": "NAME"}
            options["metavar"] = "{" + ",".join(meta["choices"]) + "}" if meta["choices"] else names[meta["kind"]]
            if field.default not in (None, ""):
                help_text += f" (default: {field.default})"
        sections[meta["group"]].add_argument(flag(field.name), help=help_text, **options)


def parse_eval(argv: Sequence[str]) -> list[EvalConfig]:
    """Flags -> a configuration for each model, each with a folder of its own.

    Raises:
        ConfigError: every problem found at once.
    """
    namespace, unknown = eval_parser().parse_known_args(list(argv))
    flags: dict[str, Any] = vars(namespace)
    models = list(flags.pop("models"))
    strange = [word for word in unknown if word.startswith("-")]
    problems = [unknown_eval_key(word.lstrip("-").split("=")[0].replace("_", "-")) for word in strange]
    # a model that stands behind a flag is left over too; the value of an unknown flag looks like one
    models += [word for word in unknown if word not in strange]
    models = [model for model in models if not follows_unknown(argv, model, strange)]
    if not models:
        problems.append("no model is given: name one or several, as in arrest-eval runs/mine/export --dataset cifar10.")
    if len(models) > 1 and flags.get("robustbench_json"):
        problems.append("--robustbench-json is the entry of one model: evaluate the models one by one for it.")
    if flags.get("robustbench_json") and flags.get("dataset"):
        names_of_attacks = [name.strip().lower() for name in str(flags.get("attacks") or "autoattack").split(",")]
        problems += robustbench_problems(flags["dataset"], flags.get("norm", "linf"), names_of_attacks)
    if len(set(models)) < len(models):
        problems.append("a model is named twice: name each once.")
    configs = []
    names: list[str] = []
    for model in models or ["model"]:
        config = EvalConfig(model=model, **flags)
        try:
            config.validate()
        except ConfigError as error:
            problems += error.problems
        if len(models) > 1:
            root = flags.get("output_dir") or "evals/" + evaluation_name(
                config.dataset, config.norm, config.eps, "comparison"
            )
            name = evaluation_name(model)
            names.append(name)
            config.output_dir = f"{root}/{name}" + (f"-{names.count(name)}" if names.count(name) > 1 else "")
        configs.append(config)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return configs


def follows_unknown(argv: Sequence[str], word: str, unknown: Sequence[str]) -> bool:
    """Whether ``word`` stands right behind a flag that does not exist, and so may be its value."""
    return any(other == word and before in unknown and "=" not in before for before, other in itertools.pairwise(argv))


def parse_finetune(argv: Sequence[str]) -> tuple[FinetuneConfig, list[str]]:
    """Flags -> configuration, plus sentences to print about where it came from.

    Raises:
        ConfigError: every problem found in flags and recipe at once.
    """
    problems: list[str] = []
    namespace, unknown = finetune_parser().parse_known_args(list(argv))
    flags: dict[str, Any] = vars(namespace)
    strange = [word for word in unknown if word.startswith("--")]
    for word in unknown:
        if word in strange:
            problems.append(unknown_key(word[2:].split("=")[0].replace("_", "-"), "flag"))
        elif not follows_unknown(argv, word, strange):
            problems.append(f"{word!r} is not a flag: every option is written --name value. See --help.")
    if "model_args" in flags:
        flags["model_args"] = _read_mapping(flags["model_args"], problems)

    if flags.get("resume") and flags.get("output_dir"):
        saved = Path(flags["output_dir"]).expanduser() / "config.yaml"
        if saved.is_file() and _is_of(saved, flags.get("recipe")):
            config = _collect(problems, lambda: resume_config(load_config(saved), flags), flags)
            return config, [RESUMING.format(saved)]
    name = flags.get("recipe")
    notes = []
    if name is None:
        name = recipe_for_dataset(flags.get("dataset"))
        notes.append(f"recipe: {name}, the one for this dataset (another: --recipe NAME)")
    else:
        notes.append(f"recipe: {name}")
    recipe: dict[str, Any] = {}
    try:
        recipe = read_recipe(name)
    except ConfigError as error:
        problems += error.problems
        # what the recipe would have given is not missing
        flags = {"model": "from-the-recipe", "dataset": "from-the-recipe"} | flags
    config = _collect(problems, lambda: resolve(flags, recipe, name), flags)
    if "model" in flags and flags["model"] != recipe.get("model"):
        dropped = [key for key in MODEL_KEYS[1:] if key in recipe and key not in flags]
        if dropped:
            notes.append(
                f"the recipe's {', '.join(dropped)} belong to its own model and are not used for {config.model}"
            )
    if unused := unused_flags(config, flags):
        notes.append(f"not used: {', '.join(unused)}")
    if config.resume and (saved := Path(config.output_dir) / "config.yaml").is_file():
        given = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        if _is_of(saved, name):
            given = flags | {"output_dir": config.output_dir}
            notes = [RESUMING.format(saved)]
        config = resume_config(load_config(saved), given)
    return config, notes


RESUMING = "resuming with the configuration of {}: what is not typed is as it was then"


def _is_of(saved: Path, recipe: str | None) -> bool:
    """Whether a run with the configuration ``saved`` began with this recipe; also where none is named."""
    return recipe is None or load_config(saved).recipe == recipe


def _collect(problems: list[str], build: Callable[[], FinetuneConfig], flags: dict[str, Any]) -> FinetuneConfig:
    """Run ``build`` and raise what it finds together with what was found before."""
    try:
        config = build()
    except ConfigError as error:
        problems = problems + _optimizer_problems(flags)
        # a misspelt flag often is also the reason why a required one is missing: keep the order, drop repeats
        raise ConfigError(list(dict.fromkeys(problems + error.problems))) from None
    if problems:
        raise ConfigError(problems + _optimizer_problems(flags))
    return config


def _optimizer_problems(flags: dict[str, Any]) -> list[str]:
    """The one name that only timm can check; it is worth the import if there are other problems to report with it."""
    if "optimizer" not in flags:
        return []
    from arrest_hub.prepare import optimizer_problem

    return [problem for problem in [optimizer_problem(flags["optimizer"])] if problem]


def _read_mapping(words: Sequence[str], problems: list[str]) -> dict[str, Any]:
    """``["channels=[16,32]", "drop_rate=0.1"]`` -> a dict; values are YAML."""
    result = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            problems.append(f"--model-args {word!r} is not key=value, as in channels=[16,32,64,128].")
            continue
        try:
            result[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            problems.append(f"--model-args {word!r}: {text!r} cannot be read as a value.")
    return result


def finetune_command(argv: Sequence[str]) -> None:
    """`arrest-finetune`: parse, then train. Raises ArrestError for bad input."""
    config, notes = parse_finetune(argv)
    from arrest_hub.train import dry_run, finetune

    with parting():
        (dry_run if config.dry_run else finetune)(config, notes=notes)


def eval_command(argv: Sequence[str]) -> None:
    """`arrest-eval`: parse, evaluate each model, compare if there are several. Raises ArrestError for bad input."""
    configs = parse_eval(argv)
    from arrest_hub.evaluation import evaluate_all

    with parting():
        evaluate_all(configs)


def eval_main() -> None:
    """Entry point of `arrest-eval`."""
    leave(run_cli(eval_command, sys.argv[1:]))


def finetune_main() -> None:
    """Entry point of `arrest-finetune`."""
    leave(run_cli(finetune_command, sys.argv[1:]))
