"""Facts on disk -> the README.md of an exported model. What is unknown is left out, never guessed. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import yaml

from arrest_hub.results import EvalReport, read_results, results_table


@dataclass
class CardFacts:
    """What the card says, read from the export folder."""

    library: str
    architecture: str
    steps: int
    report: EvalReport
    training_config: dict[str, Any]

    @classmethod
    def from_folder(cls, folder: Path, *, architecture: str, library: str, steps: int) -> CardFacts:
        """Read `results.json` and `training_config.yaml` from ``folder``."""
        training = yaml.safe_load((folder / "training_config.yaml").read_text(encoding="utf-8"))
        return cls(library, architecture, steps, read_results(folder / "results.json"), training)


def before_name(method: str) -> str:
    """What to call the standardly trained network: only ARREST learns from it as a teacher."""
    return "teacher (standard)" if method == "arrest" else "before (standard)"


def render_card(facts: CardFacts) -> str:
    """The card as Markdown with a YAML header."""
    template = resources.files("arrest_hub.model_cards").joinpath("robust_model.md.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    training = facts.training_config
    header = {
        "library_name": facts.library,
        "pipeline_tag": "image-classification",
        "tags": ["adversarial-robustness", "arrest-hub", training["method"], f"{training['norm']}-{training['eps']}"],
    }
    first = facts.report.results[0]
    return environment.from_string(template).render(
        header=yaml.safe_dump(header, sort_keys=False).strip(),
        facts=facts,
        training=training,
        first=first,
        table=results_table(facts.report, before_name(training["method"]), "this model", markdown=True),
        needs_arrest_hub=facts.architecture.endswith("_cifar"),
    )
