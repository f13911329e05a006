"""Facts on disk -> the README.md of an exported model. What is unknown is left out, never guessed. No torch.

The header is built with huggingface_hub's card classes, the body from `robust_model.md.j2`. Whatever comes from a user
(names, labels, ids, values) passes through one of the filters below, so that it can break neither YAML nor page.
"""

from __future__ import annotations

import functools
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCardData

from arrest_hub.card_facts import FIGURES, CardFacts, is_sealed, publication_mark, read_card, seal, threat_tags
from arrest_hub.results import CHANCE, Result, column_title, escape_markdown, one_line, results_table
from arrest_hub.training_record import BaseModel, TrainingData

TEMPLATE = "robust_model.md.j2"
HUB = "https://huggingface.co"
MOST_LABELS = 20
METHODS = {
    "arrest": "ARREST (Suzuki et al., ICCV 2023, [arXiv 2308.16454](https://arxiv.org/abs/2308.16454))",
    "at": "adversarial training (Madry et al., ICLR 2018, [arXiv 1706.06083](https://arxiv.org/abs/1706.06083))",
    "trades": "TRADES (Zhang et al., ICML 2019, [arXiv 1901.08573](https://arxiv.org/abs/1901.08573))",
}
CITATIONS = {
    "arrest": """@inproceedings{suzuki2023arrest,
  title     = {Adversarial Finetuning with Latent Representation Constraint to Mitigate Accuracy-Robustness Tradeoff},
  author    = {Suzuki, Satoshi and Yamaguchi, Shin'ya and Takeda, Shoichiro and Kanai, Sekitoshi and Makishima, Naoki
               and Ando, Atsushi and Masumura, Ryo},
  booktitle = {International Conference on Computer Vision (ICCV)},
  year      = {2023}
}""",
    "at": """@inproceedings{madry2018towards,
  title     = {Towards Deep Learning Models Resistant to Adversarial Attacks},
  author    = {Madry, Aleksander and Makelov, Aleksandar and Schmidt, Ludwig and Tsipras, Dimitris and Vladu, Adrian},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year      = {2018}
}""",
    "trades": """@inproceedings{zhang2019theoretically,
  title     = {Theoretically Principled Trade-off between Robustness and Accuracy},
  author    = {Zhang, Hongyang and Yu, Yaodong and Jiao, Jiantao and Xing, Eric and El Ghaoui, Laurent and Jordan,
               Michael},
  booktitle = {International Conference on Machine Learning (ICML)},
  year      = {2019}
}""",
    "autoattack": """@inproceedings{croce2020reliable,
  title     = {Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks},
  author    = {Croce, Francesco and Hein, Matthias},
  booktitle = {International Conference on Machine Learning (ICML)},
  year      = {2020}
}""",
}


DAMAGE = (ValueError, KeyError, TypeError, AttributeError, OSError, yaml.YAMLError, jinja2.UndefinedError)
"""What a card's files raise where they are damaged: when they are read, or when a value of another type is used."""


@functools.cache
def card_template() -> jinja2.Template:
    """The template of every card, with the filters that it uses."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "md": lambda value: escape_markdown(str(value)), "code": code, "cell": table_code, "literal": literal,
        "duration": duration, "fence": fence,
    }  # fmt: skip
    text = resources.files("arrest_hub.model_cards").joinpath(TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(text)


def render_card(facts: CardFacts) -> str:
    """The card as Markdown with a YAML header; equal facts give equal text."""
    report, training, record, repo_id = facts.report, facts.training, facts.record, facts.publication.repo_id
    base = record.base if record else None
    attacks = {row.attack for row in report.results}
    cited = [training["method"]] + ["autoattack"] * ("autoattack" in attacks)
    card = card_template().render(
        header=card_data(facts).to_yaml().strip(),
        mark=publication_mark(facts.publication),
        facts=facts,
        report=report,
        model=report.model,
        training=training,
        record=record,
        base=base,
        base_reference=_reference(base) if base else None,
        clean_epochs=_epochs(training["standard_epochs"]),
        data_link=f"{HUB}/datasets/{record.data.hub_id}/tree/{record.data.revision}"
        if record and record.data.hub_id and record.data.revision
        else None,
        method=METHODS[training["method"]],
        first=report.results[0],
        table=results_table(report, before_name(training["method"]), "this model", markdown=True),
        attacks=attacks,
        warnings=report.warnings,
        masking_checked=any(check.name != CHANCE and check.status != "skipped" for check in report.checks),
        captions=FIGURES,
        repo_id=repo_id,
        where=repo_id or "path/to/this/folder",
        timm_name=f"hf-hub:{repo_id}" if repo_id else "local-dir:path/to/this/folder",
        needs_arrest_hub=str(report.model["architecture"]).endswith("_cifar"),
        labels=(facts.label_names or [])[:MOST_LABELS],
        changed=facts.changed_parameters(),
        citations=_without_repeats([CITATIONS[name] for name in cited] + (base.citations if base else [])),
        statuses={"pass": "pass", "warn": "**warn**", "skipped": "not measured"},
    )
    return seal(card)


def _without_repeats(entries: list[str]) -> list[str]:
    """BibTeX entries, each key once: a base model of ours cites what its finetuned one does."""
    by_key: dict[str, str] = {}
    for entry in entries:
        by_key.setdefault(entry.partition("{")[2].partition(",")[0].strip(), entry)
    return list(by_key.values())


def _reference(base: BaseModel) -> str:
    """The base model's name, with a link to its commit where it is on the Hub."""
    if not (base.id and base.revision):
        return code(base.name)
    return f"[{code(base.name)}]({HUB}/{base.id}/tree/{base.revision}) at commit {code(base.revision[:12])}"


def _epochs(count: int) -> str | None:
    return f"{count} epoch{'s' if count != 1 else ''}" if count else None


def card_is_generated(folder: Path) -> bool:
    """Whether README.md in ``folder`` is missing, or is as `render_card` wrote it, whatever was measured since."""
    path = folder / "README.md"
    return not path.is_file() or is_sealed(read_card(path))


def card_data(facts: CardFacts) -> ModelCardData:
    """The header: everything the Hub searches, links and shows beside the card."""
    training, record, license = facts.training, facts.record, facts.publication.license
    base = record.base if record else None
    # a teacher of a network that began at random is not what that was made from
    hub_base = base if base is not None and base.id and training.get("init") != "random" else None
    tags = ["adversarial-robustness", "robust", "arrest-hub", str(training["method"])]
    return ModelCardData(
        library_name=str(facts.report.model["library"]),
        pipeline_tag="image-classification",
        license=license.id if license else None,
        license_name=one_line(license.name) if license and license.name else None,
        license_link=one_line(license.link) if license and license.link else None,
        base_model=hub_base.id if hub_base else None,
        base_model_relation="finetune" if hub_base else None,
        base_model_revision=hub_base.revision if hub_base else None,
        datasets=[record.data.hub_id] if record and record.data.hub_id else None,
        metrics=["accuracy"],
        tags=tags + threat_tags(training["norm"], training["eps"]),
        model_name=one_line(facts.name),
        eval_results=[_eval_result(row, facts) for row in facts.report.results],
    )


def _eval_result(row: Result, facts: CardFacts) -> EvalResult:
    """A figure as an entry of the model-index: an accuracy as a fraction, and what it was measured under."""
    entry = row.to_dict()
    data = facts.record.data if facts.record else None
    known = data if data is not None and data.name == row.dataset else None
    args = {key: entry[key] for key in ("attack", "norm", "eps", "n", "seed", "ci95") if entry[key] is not None}
    return EvalResult(
        task_type="image-classification",
        task_name="Image Classification",
        dataset_type=one_line(known.hub_id if known and known.hub_id else row.dataset),
        dataset_name=one_line(row.dataset),
        dataset_config=_dataset_config(known),
        dataset_split=one_line(re.sub(r"\[\d+\]$", "", row.split)),  # how many of its images, "n" says
        dataset_revision=known.revision if known else None,
        metric_type="accuracy",
        metric_name=_metric_name(row),
        metric_value=entry["value"],
        metric_args={key: str(value) if key == "eps" else value for key, value in args.items()},
    )


def _dataset_config(data: TrainingData | None) -> str | None:
    """The configuration in a dataset's id on the Hub, as in org/name:config@revision."""
    if data is None or data.hub_id is None or not data.name.startswith(f"{data.hub_id}:"):
        return None
    return one_line(data.name.removeprefix(f"{data.hub_id}:").partition("@")[0])


def _metric_name(row: Result) -> str:
    if row.attack is None:
        return "Clean accuracy"
    # noise is drawn, not looked for: what it leaves is no robustness
    return f"Accuracy, {column_title(row)}" if row.attack == "noise" else f"Robust accuracy, {column_title(row)}"


def before_name(method: str) -> str:
    """What to call the standardly trained network: only ARREST learns from it as a teacher."""
    return "teacher (standard)" if method == "arrest" else "before (standard)"


def code(value: Any) -> str:
    """``value`` as code within a sentence: on one line, whatever backticks it has."""
    text = one_line(_shown(value)) or " "
    marks = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    space = " " if "`" in text else ""
    return f"{marks}{space}{text}{space}{marks}"


def table_code(value: Any) -> str:
    """`code` within a table, where a bar would end the cell."""
    return code(value).replace("|", "\\|")


def fence(text: str, language: str = "") -> str:
    """``text`` as a block of code that no backticks in it can end."""
    marks = "`" * max(3, max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    return f"{marks}{language}\n{text}\n{marks}"


def literal(text: str) -> str:
    """``text`` as a literal of Python (and of JSON) in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _shown(value: Any) -> str:
    """A value as it stands in a recipe: none, true, [16, 32]."""
    if isinstance(value, str):
        return value
    if value is None:
        return "none"
    return (
        yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6).removesuffix("\n...\n").strip()
    )


def duration(seconds: float) -> str:
    """``42 s``, ``12 min``, ``3 h 05 min``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
