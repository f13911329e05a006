"""Fields of a configuration: a dataclass field carries its type, default, unit, range and help in one place.

The command line, the recipes and the saved YAML are all made from it. No torch here, so that `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import os
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from arrest_hub.errors import did_you_mean


def config_field(
    default: Any,
    kind: str,
    group: str,
    help: str,
    *,
    choices: Sequence[str] = (),
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    optional: bool = False,
    word: str | None = None,
) -> Any:
    """A config field. ``low``/``high`` are inclusive bounds, ``above`` an exclusive lower one; ``word`` is the one word
    that a number may be instead."""
    metadata = {
        "kind": kind, "group": group, "help": help, "choices": tuple(choices),
        "low": low, "high": high, "above": above, "optional": optional, "word": word,
    }  # fmt: skip
    if kind == "mapping":
        return dataclasses.field(default_factory=dict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a field, whether it is a value or made anew each time."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def flag(name: str) -> str:
    """The flag of a key: ``attack_steps`` -> ``--attack-steps``."""
    return "--" + name.replace("_", "-")


def flag_with(name: str, value: str) -> list[str]:
    """The words that give a flag its value; one word if the value would be taken for a flag."""
    return [f"{flag(name)}={value}"] if value.startswith("-") else [flag(name), value]


def parse_fraction(text: str) -> Fraction:
    """``"8/255"`` or ``"0.5"``, read exactly. Raises ValueError for anything else."""
    if not re.fullmatch(r"\s*\d+(\.\d*)?([eE]-?\d+)?\s*|\s*\d+\s*/\s*\d+\s*", text):
        raise ValueError(text)
    try:
        return Fraction(text.replace(" ", ""))
    except ZeroDivisionError as error:
        raise ValueError(text) from error


def fraction_text(value: Any) -> str:
    """A fraction as text, as it was typed, or from Python's number: of 8/255 as of "8/255". Raises ValueError."""
    # what Python makes of 8/255, and not a short decimal fraction such as 0.2
    if isinstance(value, float) and len(repr(value)) > 8 and abs(255 * value - round(255 * value)) < 1e-9:
        value = f"{round(255 * value)}/255"
    parse_fraction(str(value))
    return str(value).replace(" ", "")


def convert(field: dataclasses.Field[Any], value: Any) -> Any:
    """Bring a value from a flag (text) or from YAML (typed) to its field's type and check its range.

    Raises:
        ValueError: naming the flag, the value, why it is wrong and what to type.
    """
    meta, name = field.metadata, flag(field.name)
    kind = meta["kind"]
    if value is None or (isinstance(value, str) and value.strip().lower() in ("none", "null")):
        if meta["optional"]:
            return None
        if value is None:
            raise ValueError(f"{name} has no value; give {_wanted(field)}.")
    if meta["word"] is not None and value == meta["word"]:
        return value
    if value is False and "no" in (meta["choices"] or ()):  # YAML's reading of it
        return "no"
    shown = repr(value) if len(repr(value)) <= 200 else f"(a {type(value).__name__})"
    wrong = ValueError(f"{name} {shown} is not {_wanted(field)}.")
    if kind == "bool":
        if not isinstance(value, bool):
            raise wrong
        return value
    if isinstance(value, bool):
        raise wrong
    if kind == "mapping":
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise wrong
        return dict(value)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if kind == "str":
        if isinstance(value, (int, float)):
            value = str(value)
        if not isinstance(value, str):
            raise wrong
        if meta["choices"] and value not in meta["choices"]:
            raise ValueError(f"{wrong}{did_you_mean(value, meta['choices'])}")
        return value
    if kind == "fraction":
        try:
            result: Any = fraction_text(value)
        except ValueError:
            raise wrong from None
        number: float | Fraction = parse_fraction(result)
    elif kind == "int":
        try:
            number = result = int(value) if isinstance(value, str) else operator.index(value)  # also of numpy
        except (TypeError, ValueError):
            raise wrong from None
    else:
        try:
            number = result = float(value)
        except (TypeError, ValueError):
            raise wrong from None
        if not math.isfinite(number):
            raise wrong
    low, high, above = meta["low"], meta["high"], meta["above"]
    if (
        (low is not None and number < low)
        or (high is not None and number > high)
        or (above is not None and number <= above)
    ):
        raise ValueError(f"{name} {value} is out of range: give {_wanted(field)}.")
    return result


def _wanted(field: dataclasses.Field[Any]) -> str:
    meta = field.metadata
    text = {
        "bool": "true or false", "str": "a name", "int": "a whole number", "float": "a number",
        "fraction": "a fraction such as 8/255", "mapping": "a list of key=value",
    }[meta["kind"]]  # fmt: skip
    if meta["choices"]:
        text = "one of " + ", ".join(meta["choices"])
    bounds = [f"{word} {meta[key]:g}" for key, word in (("above", "above"), ("low", "at least"), ("high", "at most"))
              if meta[key] is not None]  # fmt: skip
    text += (" " + " and ".join(bounds)) if bounds else ""
    text += f", or {meta['word']}" if meta["word"] else ""
    return text + (", or none" if meta["optional"] else "")


def convert_all(config: Any) -> tuple[set[str], list[str]]:
    """Convert every field of a configuration in place: (names of the good ones, a problem for each of the others)."""
    good: set[str] = set()
    problems: list[str] = []
    for field in dataclasses.fields(config):
        try:
            setattr(config, field.name, convert(field, getattr(config, field.name)))
            good.add(field.name)
        except ValueError as error:
            problems.append(str(error))
    return good, problems


def eps_problem(norm: str, eps: str, name: str = "--eps") -> list[str]:
    """A line for a radius that no image in [0, 1] has room for, such as 8 instead of 8/255."""
    value = Fraction(eps)
    if norm != "linf" or value < 1:
        return []
    hint = f" Did you mean {value}/255?" if value.denominator == 1 and value < 255 else ""
    return [f"{name} {eps} is out of range: pixels are in [0, 1], so linf needs eps below 1.{hint}"]


def small_radius(norm: str, eps: str) -> str:
    """What to say behind a radius ("8/255", on pixels in [0, 1]) that is next to nothing in its norm, as linf's usual
    ones are in others; else nothing.

    Usual are l2 0.5 in RobustBench (arXiv 2010.09670) and 3 for ImageNet in MadryLab's robustness package, l1 12 in
    Croce and Hein 2021 (arXiv 2103.01208).
    """
    usual = {"l2": (0.1, "0.5 on 32 px and 3 on 224 px"), "l1": (1.0, "12 on 32 px")}.get(norm)
    if usual is None or Fraction(eps) >= usual[0]:
        return ""
    return f" (next to nothing in {norm}: usual are {usual[1]}, set with --eps)"


def repo_id_problem(name: str, repo_id: str) -> str | None:
    """A line for an id that the Hub would not take; ``name`` is the flag that it was given with."""
    from huggingface_hub.errors import HFValidationError  # late: a tenth of a second
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
        return None
    except HFValidationError:
        return (
            f"{name} {repo_id!r} is not an id on the Hub: give you/name or name, of letters, digits and single '-', "
            "'_', '.', as in me/resnet50-arrest-linf4."
        )
