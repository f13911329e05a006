"""Facts on disk -> the README.md of an exported model. What is unknown is left out, never guessed. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import yaml

from arrest_hub.results import EvalReport, read_results, results_table

FIGURES = {
    "eps_curve.png": "Accuracy against the size of the perturbation, with 95 % intervals.",
    "per_class.png": "Accuracy by class, clean and under the strongest attack measured.",
    "gallery.png": "Clean images, adversarial ones and their difference.",
    "drift.png": "How far the representation is from the teacher's.",
}
"""The pictures that a card shows, in order, and what is on them."""


@dataclass
class CardFacts:
    """What the card says, read from the export folder."""

    report: EvalReport
    training_config: dict[str, Any]
    figures: list[str] = field(default_factory=list)

    @classmethod
    def from_folder(cls, folder: Path) -> CardFacts:
        """Read `results.json` and `training_config.yaml` from ``folder``, and which pictures are in `figures/`."""
        training = yaml.safe_load((folder / "training_config.yaml").read_text(encoding="utf-8"))
        figures = [name for name in FIGURES if (folder / "figures" / name).is_file()]
        return cls(read_results(folder / "results.json"), training, figures)


def before_name(method: str) -> str:
    """What to call the standardly trained network: only ARREST learns from it as a teacher."""
    return "teacher (standard)" if method == "arrest" else "before (standard)"


def render_card(facts: CardFacts) -> str:
    """The card as Markdown with a YAML header."""
    template = resources.files("arrest_hub.model_cards").joinpath("robust_model.md.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    training, model = facts.training_config, facts.report.model
    header = {
        "library_name": model["library"],
        "pipeline_tag": "image-classification",
        "tags": ["adversarial-robustness", "arrest-hub", training["method"], f"{training['norm']}-{training['eps']}"],
    }
    first = facts.report.results[0]
    return environment.from_string(template).render(
        header=yaml.safe_dump(header, sort_keys=False).strip(),
        report=facts.report,
        model=model,
        figures={name: FIGURES[name] for name in facts.figures},
        training=training,
        first=first,
        table=results_table(facts.report, before_name(training["method"]), "this model", markdown=True),
        needs_arrest_hub=model["architecture"].endswith("_cifar"),
    )
