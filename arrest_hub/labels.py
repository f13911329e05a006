"""Do the dataset's classes and the model's outputs mean the same thing, in the same order?

A wrong answer is silent and ruinous (a model finetuned from a head whose outputs are permuted learns a
new task), so anything but a clear yes is an error that says what to type.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from arrest_hub.errors import ConfigError, did_you_mean

MODES = ("auto", "name", "index")


@dataclass(frozen=True)
class LabelMatch:
    """How dataset labels become model outputs.

    ``order[i]`` is the model output for dataset label i; None means the same numbers. ``note`` is one
    sentence for the log.
    """

    order: list[int] | None
    note: str


class ReorderedClasses(ConfigError):
    """Dataset and model have the same classes in another order, and it was not said how to match them."""


def match_labels(
    dataset_names: Sequence[str] | None,
    dataset_count: int,
    model_names: Sequence[str] | None,
    model_count: int,
    mode: str = "auto",
    *,
    new_head: bool = True,
) -> LabelMatch:
    """Compare the classes of a dataset with the outputs of a model that keeps its head.

    ``mode`` is "auto" (same names in the same order, or one side unnamed), "name" (the same names in any
    order: labels are remapped) or "index" (only the counts are compared). Names are compared without
    case, spaces, underscores and hyphens, unless that is all that tells two classes of one side apart.
    ``new_head``: whether the advice may be to train another head.

    Raises ConfigError when the counts or the names differ, `ReorderedClasses` when the order alone does in mode "auto".
    """
    if mode not in MODES:
        raise ConfigError(
            f"label match {mode!r} is unknown; use --label-match {', '.join(MODES[:-1])} or {MODES[-1]}."
            + did_you_mean(mode, MODES)
        )
    if dataset_count != model_count:
        raise ConfigError(
            f"the dataset has {dataset_count} classes and the model {model_count} outputs, so the model's head "
            + ("cannot be kept. " if new_head else "does not fit: ")
            + ("Give --standard-epochs N (such as 5) to train a new head on this dataset first, or " * new_head)
            + "choose a model trained on this dataset."
        )
    if mode == "index":
        return LabelMatch(None, f"labels matched by index ({dataset_count} classes), names not compared")
    if dataset_names is None or model_names is None:
        unnamed = "dataset" if dataset_names is None else "model"
        if mode == "name":
            raise ConfigError(
                f"--label-match name needs class names on both sides, and the {unnamed} has none. "
                "Use --label-match index if you know that the classes are in the same order."
            )
        return LabelMatch(None, f"labels matched by index ({dataset_count} classes): the {unnamed} has no class names")

    data, model = list(dataset_names), list(model_names)
    data_keys, model_keys = _keys(data, model)
    if data_keys == model_keys:
        return LabelMatch(None, f"the {dataset_count} class names of dataset and model agree")
    by_index = "--label-match index to trust the order as it is"
    otherwise = "--standard-epochs N to train a new head on this dataset first" if new_head else "a model trained on it"
    unique = len(set(data_keys)) == len(data_keys) and len(set(model_keys)) == len(model_keys)
    if unique and set(data_keys) == set(model_keys):
        output = {key: i for i, key in enumerate(model_keys)}
        order = [output[key] for key in data_keys]
        moved = [i for i, o in enumerate(order) if i != o]
        if mode == "name":
            return LabelMatch(order, f"labels matched by name: {len(moved)} of {dataset_count} classes change number")
        examples = "; ".join(f"{data[i]!r} is label {i} but output {order[i]}" for i in moved[:3])
        raise ReorderedClasses(
            f"dataset and model have the same {dataset_count} class names in another order "
            f"({len(moved)} differ: {examples}). Use --label-match name to remap the labels by name, "
            f"or {by_index}."
        )
    differing = [i for i in range(dataset_count) if data_keys[i] != model_keys[i]]
    examples = "; ".join(f"{i}: {data[i]!r} against {model[i]!r}" for i in differing[:3])
    raise ConfigError(
        f"the class names of dataset and model differ in {len(differing)} of {dataset_count} places "
        f"(dataset against model: {examples}). Use {by_index}, or {otherwise}."
    )


def _keys(*sides: list[str]) -> list[list[tuple[str, str]]]:
    """What the names of each side are compared by: `_key`, and the name itself where a side has several of that key."""
    spellings = [{(_key(name), str(name)) for name in names} for names in sides]
    counts = [Counter(key for key, _ in side) for side in spellings]

    def compared(name: str) -> tuple[str, str]:
        key = _key(name)
        return key, str(name) if any(count[key] > 1 for count in counts) else ""

    return [[compared(name) for name in names] for names in sides]


def _key(name: str) -> str:
    """The name without case, spaces, underscores and hyphens ("Golden_Retriever" -> "goldenretriever")."""
    return re.sub(r"[\s_\-]+", "", unicodedata.normalize("NFKC", str(name)).casefold())
