"""What a model card can say: the facts in an exported folder, read and put in order, and nothing else. No torch.

A fact that no file tells is None or empty here, and left out or marked on the card.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

from arrest_hub.config import FIELDS
from arrest_hub.fields import default_of
from arrest_hub.licenses import License, license_of_card
from arrest_hub.results import EvalReport, read_results
from arrest_hub.training_record import FILE_NAME as RECORD
from arrest_hub.training_record import TrainingRecord, read_record

FIGURES = {
    "eps_curve.png": "Accuracy against the size of the perturbation, with 95 % intervals.",
    "gallery.png": "Clean images, adversarial ones and their difference.",
    "per_class.png": "Accuracy by class, clean and under the attack named in it.",
    "drift.png": "How far the representation is from the teacher's.",
    "training.png": "The course of training.",
}
"""The pictures that a card shows, and what is on them."""

EVALUATION_FIGURES = tuple(name for name in FIGURES if name != "training.png")
"""Those that an evaluation draws, of its images."""

# not part of what was trained: the reader's machine, not the writer's, or how it was published
NOT_EXPORTED = ("output_dir", "resume", "overwrite", "dry_run", "num_workers", "ddp_timeout", "log_with", "figures",
                "push_to_hub", "private", "license", "license_name", "license_link")  # fmt: skip

# what no card can do without of a training_config.yaml
_TOLD = {"method", "norm", "eps", "standard_epochs"}


@dataclass(frozen=True)
class Publication:
    """Where a model is published and under which licence; None where that is not settled."""

    repo_id: str | None = None
    license: License | None = None


@dataclass
class CardFacts:
    """The facts of an exported folder.

    ``training`` is its `training_config.yaml`; ``record`` None for a folder of a version before there was one;
    ``figures`` the names of the pictures in `figures/` that a card shows; ``label_names`` None for classes that have
    none.
    """

    report: EvalReport
    training: dict[str, Any]
    record: TrainingRecord | None = None
    publication: Publication = field(default_factory=Publication)
    figures: list[str] = field(default_factory=list)
    label_names: list[str] | None = None
    num_classes: int | None = None

    @classmethod
    def from_folder(cls, folder: Path, publication: Publication | None = None) -> CardFacts:
        """Read the files beside the weights in ``folder``.

        Raises:
            ValueError: one of them is damaged. OSError: one that every export has is missing.
        """
        try:
            training = yaml.safe_load((folder / "training_config.yaml").read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{folder / 'training_config.yaml'} is not YAML: {error}") from error
        if not isinstance(training, dict) or not training.keys() >= _TOLD:
            raise ValueError(f"{folder / 'training_config.yaml'} lacks some of {', '.join(sorted(_TOLD))}")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"{folder / 'config.json'} is not a mapping of keys to values")
        names, count = _classes(config)
        report = read_results(folder / "results.json")
        if not report.results:
            raise ValueError(f"{folder / 'results.json'} has no figure of the model")
        if not isinstance(report.model.get("weights_files", {}), dict):
            raise ValueError(f"{folder / 'results.json'} has no names in weights_files")
        if missing := [name for name in ("architecture", "library", "parameters") if name not in report.model]:
            raise ValueError(f"{folder / 'results.json'} does not say the model's {', '.join(missing)}")
        return cls(
            report,
            training,
            read_record(folder / RECORD) if (folder / RECORD).is_file() else None,
            publication or Publication(),
            [name for name in FIGURES if (folder / "figures" / name).is_file()],
            names,
            count,
        )

    @property
    def name(self) -> str:
        """What to call the model: its name on the Hub, else its architecture and what was done to it."""
        if self.publication.repo_id:
            return self.publication.repo_id.split("/")[-1]
        return f"{self.report.model['architecture']}-{self.training['method']}-{self.training['norm']}"

    def changed_parameters(self) -> dict[str, Any]:
        """The hyper-parameters that differ from the defaults, without the names of model and dataset."""
        return {
            key: value
            for key, value in self.training.items()
            if key not in ("model", "dataset", "recipe") and key in FIELDS and value != default_of(FIELDS[key])
        }


def _classes(config: dict[str, Any]) -> tuple[list[str] | None, int | None]:
    """Class names and their number from a timm or transformers config.json."""
    names = config.get("label_names") or config.get("id2label")
    if names is not None and not isinstance(names, dict | list):
        raise ValueError(f"the class names in config.json are {names!r}")
    if isinstance(names, dict):
        numbered = sorted(names.items(), key=lambda item: int(item[0]))
        names = [str(value) for _, value in numbered]
        if all(name == f"LABEL_{index}" for index, name in enumerate(names)):
            return None, len(names)  # transformers' placeholders
    if names:
        return [str(name) for name in names], len(names)
    return None, config.get("num_classes")


def threat_tags(norm: str, eps: str) -> list[str]:
    """The tags by which models are found that withstand these perturbations: the norm, and the norm with the radius.

    ``eps`` is a fraction; equal radii give equal tags: "8/255" for linf, "1/2" else.
    """
    value = Fraction(eps)
    units = value * 255
    radius = f"{units.numerator}/255" if norm == "linf" and units.denominator == 1 else str(value)
    return [norm, f"{norm}-{radius}"]


# on a line of its own: whatever of it a name in the header has is indented or quoted
_MARK = re.compile(
    r"^<!-- Made by arrest-hub; id: (?P<id>[\w./-]+); digest: (?P<digest>[0-9a-f]{16}|none) -->", re.MULTILINE
)


def publication_mark(publication: Publication) -> str:
    """A comment for the card's body that `read_publication` reads the id from; `seal` fills in the digest."""
    return f"<!-- Made by arrest-hub; id: {publication.repo_id or 'none'}; digest: none -->"


def seal(card: str) -> str:
    """The card with a digest of its text in its mark, by which `is_sealed` knows that nobody edited it."""
    return _MARK.sub(lambda mark: mark[0].replace("digest: none", f"digest: {_digest(card)}"), card, count=1)


def is_sealed(card: str) -> bool:
    """Whether a card is as `seal` left it."""
    found = _MARK.search(card)
    return found is not None and found["digest"] == _digest(card)


def _digest(card: str) -> str:
    text = _MARK.sub(lambda mark: f"<!-- {mark['id']} -->", card, count=1)
    return hashlib.sha256(text.replace("\r\n", "\n").encode()).hexdigest()[:16]


def read_card(path: Path) -> str:
    """The text of a card; "" if there is none. What is not UTF-8 is replaced: such a card was edited by hand."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def read_publication(card: str) -> Publication:
    """Under which id and licence a card says that its model is published; nothing of it for text that is no card."""
    found = _MARK.search(card)
    repo_id = found["id"] if found and found["id"] != "none" else None
    return Publication(repo_id, license_of_card(card_header(card)))


_HEADER = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)


def has_body(card: str) -> bool:
    """Whether there is more to a card than its header, which is all that the Hub writes for a new repository."""
    return bool(_HEADER.sub("", card, count=1).strip())


def card_header(card: str) -> dict[str, Any]:
    """The YAML header of a card; empty if it has none, or one that is not YAML."""
    block = _HEADER.match(card)
    try:
        header = yaml.safe_load(block[1]) if block else {}
    except (yaml.YAMLError, ValueError):  # ValueError: a date that does not exist
        return {}
    return header if isinstance(header, dict) else {}


def card_citations(card: str, most: int = 5) -> list[str]:
    """The BibTeX entries in a card's text, at most so many, in order."""
    entries = []
    for start in re.finditer(r"^[ \t]*@[A-Za-z]+\{", card, re.MULTILINE):
        depth = 0
        for end in range(start.end() - 1, min(len(card), start.end() + 4000)):
            depth += (card[end] == "{") - (card[end] == "}")
            if depth == 0:
                entry = "\n".join(line.rstrip() for line in card[start.start() : end + 1].strip().splitlines())
                if entry not in entries:
                    entries.append(entry)
                break
    return entries[:most]
