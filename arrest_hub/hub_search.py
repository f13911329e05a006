"""Finding robust models on the Hub by what they withstand: `arrest_hub.list_models`. No torch, no download."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from arrest_hub.card_facts import threat_tags
from arrest_hub.errors import ConfigError
from arrest_hub.fields import eps_problem, fraction_text
from arrest_hub.hub_access import with_retries
from arrest_hub.results import attack_rank

TAG = "arrest-hub"
NORMS = ("linf", "l2")


@dataclass(frozen=True)
class PublishedModel:
    """A robust model on the Hub, as its card's header describes it; None and empty for what that does not say.

    ``norm`` and ``eps`` are the threat model it was trained for. ``clean_accuracy`` and ``robust_accuracy`` (under
    ``attack``, the one that broke most; noise is none) are fractions that whoever published states.
    """

    id: str
    revision: str | None
    library: str | None
    base_model: str | None
    norm: str | None
    eps: str | None
    method: str | None
    datasets: tuple[str, ...]
    clean_accuracy: float | None
    robust_accuracy: float | None
    attack: str | None
    downloads: int | None
    tags: tuple[str, ...]


def list_models(
    search: str | None = None,
    *,
    norm: str | None = None,
    eps: str | float | None = None,
    dataset: str | None = None,
    method: str | None = None,
    base_model: str | None = None,
    tags: str | Sequence[str] = (),
    author: str | None = None,
    limit: int | None = None,
) -> list[PublishedModel]:
    """The models published with arrest-hub that fit all that is given, most downloaded first.

    ``search`` is part of the id; ``norm`` "linf" or "l2"; ``eps`` a radius such as "8/255" or 8/255, together with
    ``norm``; ``dataset`` an id on the Hub or a name such as "cifar10", as cards have it under ``datasets``; ``method``
    "arrest", "at", "trades"; ``base_model`` an id; ``tags`` any others; ``author`` a user or an organisation;
    ``limit`` at most so many.

    Raises:
        ConfigError: a value that no model can have. HubError: the Hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    if limit is not None and not (isinstance(limit, int) and limit >= 0):
        raise ConfigError(f"limit {limit!r} is no number of models: give 0 or more, or None for all of them.")
    wanted = [TAG, *([tags] if isinstance(tags, str) else tags)]
    wanted += _threat_filter(norm, eps) + ([method] if method else [])
    if dataset is not None:
        hub_id = hub_dataset_id(dataset)
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id):
            raise ConfigError(
                f"dataset {dataset!r} is no id on the Hub (org/name), so that no card lists it under datasets: give "
                "one, or cifar10, cifar100 or imagenet."
            )
        wanted.append(f"dataset:{hub_id}")
    if base_model is not None:
        wanted.append(f"base_model:{base_model}")
    api = HfApi()

    def ask() -> list[PublishedModel]:
        found = api.list_models(filter=wanted, search=search, author=author, sort="downloads", cardData=True, full=True)
        return [_from_info(info) for info in islice(found, limit)]

    return with_retries(ask, "list the models", lambda _: None)


def _threat_filter(norm: str | None, eps: str | float | None) -> list[str]:
    if norm is not None and norm not in NORMS:
        raise ConfigError(f"norm {norm!r} is not one of {', '.join(NORMS)}.")
    if eps is None:
        return [norm] if norm else []
    try:
        eps = fraction_text(eps)
    except ValueError:
        raise ConfigError(f"eps {eps!r} is not a fraction such as 8/255.") from None
    if norm is None:
        raise ConfigError(f"eps {eps} means something in a norm only: give norm='linf' or norm='l2' with it.")
    if problems := eps_problem(norm, eps):
        raise ConfigError(problems)
    return threat_tags(norm, eps)


def hub_dataset_id(name: str) -> str:
    """The id on the Hub of a dataset's short name (cifar10, cifar100, imagenet), or ``name`` as it is."""
    if "/" in name:
        return name
    from arrest_hub.sources import ALIASES  # late: it imports `datasets`

    alias = ALIASES.get(name)
    return alias.hub_id if alias is not None and alias.hub_id else name


def _from_info(info: Any) -> PublishedModel:
    header: dict[str, Any] = info.card_data.to_dict() if info.card_data else {}
    tags = tuple(info.tags or ())
    norm = next((tag for tag in tags if tag in NORMS), None)
    radius = next((tag for tag in tags if norm and tag.startswith(f"{norm}-")), None)
    base = header.get("base_model")
    datasets = header.get("datasets") or ()
    clean, robust = _figures(header)
    return PublishedModel(
        id=info.id,
        revision=info.sha,
        library=info.library_name or header.get("library_name"),
        base_model=base[0] if isinstance(base, list) and base else base or None,
        norm=norm,
        eps=radius.partition("-")[2] if radius else None,
        method=next((tag for tag in tags if tag in ("arrest", "at", "trades")), None),
        datasets=(datasets,) if isinstance(datasets, str) else tuple(datasets),
        clean_accuracy=clean.get("value"),
        robust_accuracy=robust.get("value"),
        attack=(robust.get("args") or {}).get("attack"),
        downloads=info.downloads,
        tags=tags,
    )


def _figures(header: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The clean figure and the robust one of a card's model-index; empty for what it has not, or not as we write it."""
    found: list[tuple[Any, str | None, Any, dict[str, Any]]] = []  # dataset, attack, radius, metric
    try:
        for result in header["model-index"][0]["results"]:
            for metric in result["metrics"]:
                args = metric.get("args") or {}
                attack = args.get("attack")
                if metric["type"] == "accuracy" and isinstance(metric["value"], float | int):
                    found.append((result.get("dataset"), attack, (args.get("norm"), args.get("eps")), metric))
    except (KeyError, IndexError, TypeError, AttributeError):
        return {}, {}
    # as `EvalReport.get` has it
    clean = next((row for row in found if row[1] is None), None)
    robust = [row for row in found if isinstance(row[1], str) and row[1] != "noise"]
    robust = [row for row in robust if clean is not None and row[0] == clean[0]] or robust
    robust = [row for row in robust if (row[0], row[2]) == (robust[0][0], robust[0][2])]
    robust.sort(key=lambda row: attack_rank(row[1]), reverse=True)
    lowest = min(robust, key=lambda row: float(row[3]["value"]), default=None)
    return clean[3] if clean else {}, lowest[3] if lowest else {}
