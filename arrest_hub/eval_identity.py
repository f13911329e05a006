"""By what an evaluation is known again when it is resumed: what every figure depends on."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Any

import torch
from accelerate import Accelerator

from arrest_hub.errors import ConfigError
from arrest_hub.eval_config import EvalConfig
from arrest_hub.eval_record import EvalPaths
from arrest_hub.eval_subjects import EvalImages, Subject, preprocessing_facts, sample_digest
from arrest_hub.journal import identity_problems
from arrest_hub.results import EvalReport, read_results
from arrest_hub.verdicts import Verdicts, read_verdicts

IDENTITY = "identity"
"""Under this name the verdicts keep what `eval_identity` says, by which a finished evaluation is known again."""
TEACHER = "teacher's weights"


def eval_identity(
    config: EvalConfig, subject: Subject, teacher: Subject | None, images: EvalImages, accelerator: Accelerator
) -> dict[str, Any]:
    """What every figure depends on; a resumed evaluation must have the same."""
    settings = ("norm", "eps", "attacks", "cascade", "pgd_restarts", "pgd_step_size", "batch_size", "precision",
                "channels_last", "compile", "seed", "check_images", "curve_images")  # fmt: skip
    return {
        "weights": subject.info["weights_sha256"], "preprocessing": preprocessing_facts(subject),
        TEACHER: teacher.info["weights_sha256"] if teacher else None,
        "dataset revision": images.revision, "images": images.digest, "pixels": sample_digest(images.images),
        "device": accelerator.device.type, "torch": torch.__version__, "pyautoattack": version("pyautoattack"),
        **{name: getattr(config, name) for name in settings},
        "attack_precision": config.attack_precision, "fold_batchnorm": config.fold_batchnorm or None,
    }  # fmt: skip


def read_record(paths: EvalPaths) -> tuple[EvalReport, Verdicts] | None:
    """A finished evaluation; None where there is none. Raises ConfigError for one that is damaged."""
    if not paths.results.is_file():
        return None
    try:
        return read_results(paths.results), read_verdicts(paths.verdicts)
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"cannot resume: the evaluation in {paths.root} is damaged ({error}). Start anew with --overwrite, or with "
            "another --output-dir."
        ) from error


def check_record(
    paths: EvalPaths, subject: Subject, identity: dict[str, Any], report: EvalReport, verdicts: Verdicts
) -> None:
    """Versions and device may be others by now than those of a finished evaluation, and its teacher may be gone.

    Raises:
        ConfigError: it is of other weights, images or preprocessing, or of another teacher.
    """
    if report.model.get("weights_sha256") != subject.info["weights_sha256"]:
        raise ConfigError(
            f"cannot resume: {paths.root} is the evaluation of other weights than {subject.name} has now. Start anew "
            "with --overwrite, or with another --output-dir."
        )
    recorded = json.loads(verdicts.metadata.get(IDENTITY, "{}"))  # older records have none
    same = ["preprocessing", "images"]
    if recorded.get("torch") == identity["torch"]:  # other versions may decode and resize with other rounding
        same.append("pixels")
    if None not in (recorded.get(TEACHER), identity[TEACHER]):
        same.append(TEACHER)
    now = json.loads(json.dumps(identity))
    old, new = ({name: facts[name] for name in same if name in recorded} for facts in (recorded, now))
    if problems := identity_problems(old, new):
        raise ConfigError(problems)
