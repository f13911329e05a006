"""Attacks that look for adversarial images in another arithmetic than the one that judges them."""

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tiny import patterns, robust_net

import arrest_hub
from arrest_hub import machine
from arrest_hub.attack_stages import in_attack_precision
from arrest_hub.errors import ConfigError
from arrest_hub.eval_config import EvalConfig
from arrest_hub.evaluator import Attacked, Evaluator, TensorImages
from arrest_hub.journal import Journal
from arrest_hub.tf32 import tf32_allowed
from arrest_hub.verdicts import read_verdicts

pytestmark = pytest.mark.usefixtures("few_iterations")
SCHEMA = json.loads((Path(__file__).parent.parent / "docs" / "results.schema.json").read_text(encoding="utf-8"))


class Brightness(torch.nn.Module):
    """Class 1 for images brighter than a half."""

    def forward(self, x):
        mean = x.flatten(1).mean(dim=1)
        return torch.stack([0.5 - mean, mean - 0.5], dim=1)


def evaluator(precision="fp32", attack_precision=None):
    """Of three dark images."""
    accelerator = Accelerator(cpu=True)
    images = TensorImages(torch.full((3, 3, 8, 8), 0.4), torch.zeros(3, dtype=torch.long))
    return Evaluator(
        Brightness(), images, accelerator, Journal(None, {}, accelerator), batch_size=2, precision=precision,
        attack_precision=attack_precision,
    )  # fmt: skip


def brighter(eps, seen):
    """An attack that makes images brighter, and stops where the network it follows is fooled, or at ``eps``."""

    def make(logits_fn):
        def run(pixels, labels, number):
            seen.append((logits_fn, len(pixels), tf32_allowed()))
            for step in np.arange(0, eps + 1e-6, 0.02):
                adversarial = pixels + step
                if (logits_fn(adversarial).argmax(dim=1) != labels).all():
                    break
            return Attacked(adversarial, {})

        return run

    return make


@pytest.mark.parametrize(
    ("boundary", "eps", "broken", "again"),
    [
        (0.45, 0.16, 3, 3),  # the search stops too early, and the attack is run again
        (0.45, 0.08, 0, 3),  # again, and to the end: they stand
        (0.5, 0.16, 3, 0),
        (0.6, 0.16, 3, 0),  # the search does not know that it succeeded
        (0.6, 0.08, 0, 0),
    ],
)
def test_no_image_stands_because_the_search_believed_to_be_done(boundary, eps, broken, again):
    here, seen = evaluator("fp32", "bf16"), []

    def search(x):
        return Brightness()(x + 0.5 - boundary)

    here.search = search
    attack = in_attack_precision(here, brighter(eps, seen))
    found = here.attack("bright", range(3), attack, title="bright", passes=1, of=3)
    assert len(found.broken) == broken
    assert sum(entry["attacked_again"] for entry in found.entries) == again
    sizes = {name: [n for logits_fn, n, _ in seen if logits_fn is name] for name in (search, here.classify)}
    assert sizes == {search: [2, 1], here.classify: [2, 1] if again else []}


@pytest.mark.parametrize(("precision", "search"), [("fp32", "tf32"), ("tf32", "fp32"), ("fp32", "bf16")])
def test_each_network_has_its_arithmetic(precision, search):
    """What the switches say in the search, in the second attack, and in the pass that judges."""
    here, seen, judged = evaluator(precision, search), [], []
    plain = here.classify

    def classify(x):
        judged.append(tf32_allowed())
        return plain(x)

    here.classify, here.search = classify, lambda x: plain(x + 0.05)
    attack = in_attack_precision(here, brighter(0.16, seen))
    here.attack("bright", range(3), attack, title="bright", passes=1, of=3)
    on = {name: (name == "tf32",) * 2 for name in (precision, search)}
    assert [allowed for logits_fn, _, allowed in seen if logits_fn is here.search] == [on[search]] * 2
    assert [allowed for logits_fn, _, allowed in seen if logits_fn is classify] == [on[precision]] * 2
    assert set(judged) == {on[precision]}


def test_without_it_there_is_one_network_and_one_attack():
    here = evaluator("fp32", "fp32")
    assert here.search is here.classify
    make = brighter(0.1, [])
    assert in_attack_precision(here, lambda logits_fn: make).__name__ == make.__name__
    assert EvalConfig(model="m", dataset="d", attack_precision="fp32").validate().attack_precision is None


def test_verdicts_stay_in_fp32(tmp_path):
    """Of bf16, which rounds logits to three digits, only the search is left."""
    options = {"eps": "28/255", "attacks": "pgd-5,apgd-ce,fab-t", "checks": False, "teacher": None}
    pair = patterns(48, 4, seed=7)
    plain, mixed, half = (
        arrest_hub.evaluate(robust_net(), pair, output_dir=tmp_path / str(number), **options, **changes)
        for number, changes in enumerate(({}, {"attack_precision": "bf16"}, {"precision": "bf16"}))
    )
    assert [one.precision for one in (plain, mixed, half)] == ["fp32", "fp32 (attacks in bf16)", "bf16"]
    predictions = [read_verdicts(tmp_path / str(number) / "verdicts.parquet").prediction for number in range(3)]
    assert np.array_equal(predictions[0], predictions[1])
    assert mixed.results[0].correct == plain.results[0].correct
    for row, other in zip(plain.results[1:], mixed.results[1:], strict=True):
        assert abs(row.correct - other.correct) <= 2
        assert 0 < other.correct < mixed.results[0].correct
        assert "attacked_again" not in json.dumps(row.attack_parameters)
        assert json.dumps(other.attack_parameters).count("attacked_again") >= 1
    (fab,) = mixed.results[-1].attack_parameters["parts"]
    assert fab["attacked_again"] > 0, "FAB's images lie at the boundary, and bf16 moves it"
    jsonschema.validate(json.loads((tmp_path / "1" / "results.json").read_text()), SCHEMA)


def test_a_resumed_evaluation_keeps_it(tmp_path):
    options = {"attacks": "pgd-2", "checks": False, "teacher": None, "figures": False, "output_dir": tmp_path / "out"}
    arrest_hub.evaluate(robust_net(), patterns(8, 4), attack_precision="bf16", **options)
    before = (tmp_path / "out" / "results.json").read_bytes()
    for other in (None, "fp32"):
        with pytest.raises(ConfigError, match="--attack-precision is None but the evaluation to resume has bf16"):
            arrest_hub.evaluate(robust_net(), patterns(8, 4), attack_precision=other, resume=True, **options)
    arrest_hub.evaluate(robust_net(), patterns(8, 4), attack_precision="bf16", resume=True, **options)
    assert (tmp_path / "out" / "results.json").read_bytes() == before


def test_what_the_machine_cannot_do_is_said(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = {"attacks": "pgd-1", "checks": False, "teacher": None}
    with pytest.raises(ConfigError) as raised:
        arrest_hub.evaluate(robust_net(), patterns(4, 4), precision="bf16", attack_precision="tf32", **options)
    assert "--attack-precision tf32 needs an NVIDIA GPU" in str(raised.value)
    with pytest.raises(ConfigError, match="--attack-precision 'fp16' is not one of"):
        arrest_hub.evaluate(robust_net(), patterns(4, 4), attack_precision="fp16", **options)
    monkeypatch.setattr(machine, "bf16_slowdown", lambda: 18.4)
    arrest_hub.evaluate(robust_net(), patterns(4, 4), attack_precision="bf16", **options)
    assert "Give --attack-precision fp32." in capsys.readouterr().out
