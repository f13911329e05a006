"""Attacks that follow another network than the one that judges: in less precision, or with its BatchNorm folded."""

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tiny import LogitsOnly, patterns, robust_net, tiny_backbone

import arrest_hub
from arrest_hub import machine
from arrest_hub.attack_stages import by_search
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
    attack = by_search(here, brighter(eps, seen))
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
    attack = by_search(here, brighter(0.16, seen))
    here.attack("bright", range(3), attack, title="bright", passes=1, of=3)
    on = {name: (name == "tf32",) * 2 for name in (precision, search)}
    assert [allowed for logits_fn, _, allowed in seen if logits_fn is here.search] == [on[search]] * 2
    assert [allowed for logits_fn, _, allowed in seen if logits_fn is classify] == [on[precision]] * 2
    assert set(judged) == {on[precision]}


def test_without_it_there_is_one_network_and_one_attack():
    here = evaluator("fp32", "fp32")
    assert here.search is here.classify
    make = brighter(0.1, [])
    assert by_search(here, lambda logits_fn: make).__name__ == make.__name__
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


PASSES = []


class Watched(torch.nn.Module):
    """Logits of a network with BatchNorm; each pass of it and of its copies is noted, and whether for a gradient."""

    def __init__(self):
        super().__init__()
        self.net = LogitsOnly(tiny_backbone(4))

    def forward(self, x):
        PASSES.append((self, x.requires_grad))
        return self.net(x)


@pytest.mark.parametrize("channels_last", [False, True])
def test_attacks_follow_the_folded_network_and_verdicts_do_not(channels_last, tmp_path):
    options = {"eps": "20/255", "attacks": "pgd-5,apgd-ce,fab-t", "checks": False, "teacher": None,
               "channels_last": channels_last, "batch_size": 8}  # fmt: skip
    network, (pixels, _), found = Watched().eval(), patterns(16, 4, seed=7), []
    with torch.no_grad():
        pair = pixels, network(pixels).argmax(dim=1)
    for fold in (False, True):
        PASSES.clear()
        output_dir = tmp_path / str(fold)
        found.append(arrest_hub.evaluate(network, pair, fold_batchnorm=fold, output_dir=output_dir, **options))
        attacked = [one is network for one, gradient in PASSES if gradient]
        assert len(attacked) > 100
        # classes are counted with the network itself, and few images are attacked again
        assert sum(attacked) < len(attacked) / 3 if fold else all(attacked)
        assert sum(one is network for one, gradient in PASSES if not gradient) > 6
    plain, folded = found
    layout = ", channels_last" if channels_last else ""
    assert [one.precision for one in found] == ["fp32" + layout, "fp32 (attacks folded)" + layout]
    for row, other in zip(plain.results, folded.results, strict=True):
        assert abs(row.correct - other.correct) <= 1
    assert 0 < folded.results[-2].correct < folded.results[0].correct
    jsonschema.validate(json.loads((tmp_path / "True" / "results.json").read_text()), SCHEMA)


def test_folded_and_in_bf16(tmp_path):
    options = {"eps": "20/255", "attacks": "pgd-2", "checks": False, "teacher": tiny_backbone(4)}
    options |= {"fold_batchnorm": True, "attack_precision": "bf16", "output_dir": tmp_path / "out"}
    report = arrest_hub.evaluate(tiny_backbone(4), patterns(16, 4), **options)
    assert report.precision == "fp32 (attacks in bf16 and folded)"
    assert "attacked_again" in report.results[-1].attack_parameters
    assert "attacked_again" in report.teacher_results[-1].attack_parameters
    jsonschema.validate(json.loads((tmp_path / "out" / "results.json").read_text()), SCHEMA)


def test_folded_and_compiled(monkeypatch):
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network: plain(network, backend="eager"))
    options = {"eps": "20/255", "attacks": "pgd-2", "checks": False, "teacher": None}
    reports = [
        arrest_hub.evaluate(tiny_backbone(4), patterns(16, 4), fold_batchnorm=on, compile=on, **options)
        for on in (False, True)
    ]
    assert [row.correct for row in reports[1].results] == [row.correct for row in reports[0].results]
    assert reports[1].precision == "fp32 (attacks folded), compiled"


def test_without_batchnorm_there_is_nothing_to_fold(capsys):
    options = {"attacks": "pgd-1", "checks": False, "teacher": None, "fold_batchnorm": True}
    report = arrest_hub.evaluate(robust_net(), patterns(4, 4), **options)
    assert report.precision == "fp32"
    assert "attacked_again" not in report.results[-1].attack_parameters
    assert "fp32 (no TF32), nothing to fold" in capsys.readouterr().out


def test_a_network_that_cannot_be_copied_is_not_folded(tmp_path):
    """Said before an earlier evaluation is deleted, of a teacher too."""
    network, lock = tiny_backbone(4), (x for x in range(3))  # no generator can
    network.lock = lock
    options = {"attacks": "pgd-1", "checks": False, "figures": False, "output_dir": tmp_path / "out"}
    pair = patterns(4, 4)
    assert arrest_hub.evaluate(network, pair, teacher=None, **options).precision == "fp32"
    before = (tmp_path / "out" / "results.json").read_bytes()
    for model, teacher in ((network, None), (tiny_backbone(4), network)):
        with pytest.raises(ConfigError, match=r"--fold-batchnorm: what of .* cannot be found out \(TypeError.*out"):
            arrest_hub.evaluate(model, pair, teacher=teacher, fold_batchnorm=True, overwrite=True, **options)
        assert (tmp_path / "out" / "results.json").read_bytes() == before


def test_a_search_whose_logits_are_not_finite_spares_nothing():
    """By argmax they would be of class 0, the images' own, and the attack would have come to its end in vain."""
    here, seen = evaluator("fp32", "bf16"), []
    here.search = lambda x: Brightness()(x) * float("nan")
    found = here.attack("bright", range(3), by_search(here, brighter(0.08, seen)), title="bright", passes=1, of=3)
    assert sum(entry["attacked_again"] for entry in found.entries) == 3
    assert sum(n for logits_fn, n, _ in seen if logits_fn is here.classify) == 3
    assert found.broken == []
