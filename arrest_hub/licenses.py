"""Licences as a model card's header states them, and which one a finetuned model is published under. No torch.

The ids are the Hub's (its documentation's page "Licenses"). A model made from another one's weights is under that one's
conditions, so a licence is taken over only where it lets everybody do as they like, and never made up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from arrest_hub.errors import did_you_mean


def _ids(text: str) -> frozenset[str]:
    return frozenset(text.split())


PERMISSIVE = _ids("""
    afl-3.0 apache-2.0 artistic-2.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 ecl-2.0 etalab-2.0 isc mit ms-pl ncsa odc-by
    openmdw-1.0 pddl postgresql unlicense wtfpl zlib
""")
"""Taken over from a base model's card without a question: at most they ask to be named."""
RESTRICTIVE = _ids("""
    agpl-3.0 apple-amlr apple-ascl bigcode-openrail-m bigscience-bloom-rail-1.0 bigscience-openrail-m c-uda cc
    cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
    cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cdla-sharing-1.0 creativeml-openrail-m
    deepfloyd-if-license epl-1.0 epl-2.0 eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl
    gpl-2.0 gpl-3.0 h-research intel-research lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2
    llama3.3 llama4 lppl-1.3c mpl-2.0 odbl ofl-1.1 openrail openrail++ osl-3.0 other
""")
"""Known too, but with conditions on what is made from the model: whoever publishes has to have read them."""


@dataclass(frozen=True)
class License:
    """A licence as a model card's header states it: the Hub's id, and for "other" its name and link."""

    id: str
    name: str | None = None
    link: str | None = None


def license_problems(license: str | None, name: str | None, link: str | None) -> list[str]:
    """What is wrong with --license, --license-name and --license-link: a line for each."""
    problems = []
    if license is not None and license not in PERMISSIVE | RESTRICTIVE:
        near = did_you_mean(license.lower(), PERMISSIVE | RESTRICTIVE)
        problems.append(
            f"--license {license!r} is not one that the Hub lists.{near} Give its id, such as apache-2.0, or other "
            "with --license-name and --license-link."
        )
    if license == "other" and not (name and link):
        problems.append("--license other needs --license-name NAME and --license-link URL, which the Hub then shows.")
    if license != "other" and (name or link):
        given = "--license-name" if name else "--license-link"
        problems.append(f"{given} belongs to --license other, which was not given.")
    return problems


def license_of_card(header: Mapping[str, Any]) -> License | None:
    """The licence that the YAML header of a card states; None if it states none."""
    stated = header.get("license")
    if isinstance(stated, list):
        stated = ", ".join(map(str, stated))
    if not stated or str(stated).lower() in ("unknown", "none"):
        return None
    name, link = header.get("license_name"), header.get("license_link")
    known = str(stated).lower() in PERMISSIVE | RESTRICTIVE  # the Hub's ids are in lower case; people write Apache-2.0
    stated = str(stated).lower() if known else str(stated)
    return License(stated, None if name is None else str(name), None if link is None else str(link))


def choose_license(
    given: License | None, base_license: License | None, base_name: str | None
) -> tuple[License | None, str | None]:
    """The licence to publish under: the one ``given``, else the base model's if it is a permissive one.

    ``base_name`` is None for a network trained from a random initialisation. The second value is a line for
    ConfigError where there is none to take.
    """
    if given is not None:
        return given, None
    ask = "say under which licence you publish, as in --license apache-2.0."
    if base_name is None:
        return None, f"this model has no base model whose licence it could take over: {ask}"
    if base_license is None:
        return (
            None,
            f"the licence of the base model {base_name} is not known (its card states none): find out, then {ask}",
        )
    shown = base_license.id + (f" ({base_license.name})" if base_license.name else "")
    if base_license.id not in PERMISSIVE | RESTRICTIVE:
        return None, (
            f"the base model {base_name} is under {shown}, which is not one of the licences that are known here: read "
            f"it, then {ask.replace('apache-2.0', 'other')}"
        )
    if base_license.id not in PERMISSIVE:
        return None, (
            f"the base model {base_name} is under {shown}, which sets conditions for models made from it: read them, "
            f"then {ask.replace('apache-2.0', base_license.id)}"
        )
    return base_license, None
