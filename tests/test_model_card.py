import yaml

from arrest_hub.config import FinetuneConfig
from arrest_hub.model_card import CardFacts, render_card
from arrest_hub.results import Check, EvalReport, Result


def make(library="timm", architecture="resnet18_cifar", checks=(), figures=(), **changes):
    rows = [
        Result("clean_accuracy", None, None, None, 866, 1000, "cifar10", "test", 0, 1.0),
        Result("robust_accuracy", "pgd-20", "linf", "8/255", 461, 1000, "cifar10", "test", 0, 1.0),
    ]
    model = {"library": library, "architecture": architecture, "steps": 500}
    report = EvalReport(rows, hardware="1 x CPU", model=model, checks=list(checks))
    training = yaml.safe_load(FinetuneConfig(model="m", dataset="cifar10", **changes).to_yaml())
    return render_card(CardFacts(report, training, list(figures)))


def test_card_states_the_threat_model_and_the_figures():
    card = make()
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "timm"
    assert {"arrest", "linf-8/255"} <= set(header["tags"])
    assert "| this model | 86.6 % [84.3, 88.6] | 46.1 % [43.0, 49.2] |" in card
    assert "import arrest_hub.architectures" in card
    assert "RGKD weight" in card


def test_card_says_only_what_applies():
    card = make("transformers", "vit", method="at")
    assert "AutoModelForImageClassification" in card
    assert "arrest_hub" not in card
    assert "RGKD" not in card
    assert "Suzuki" not in card


def test_card_shows_the_pictures_there_are_and_every_warning():
    checks = [
        Check("more steps are never weaker", "pass", 0.0, "46 % stand PGD-20, 45 % PGD-60."),
        Check("share of zero gradients", "warn", 0.4, "40 % of the images. Attacks cannot work."),
        Check("transfer", "skipped", None, "Not measured: no teacher is known."),
    ]
    card = make(checks=checks, figures=["eps_curve.png", "gallery.png"])
    assert "](figures/eps_curve.png)" in card
    assert "](figures/gallery.png)" in card
    assert "drift.png" not in card
    assert "| share of zero gradients | **warn** | 40 % of the images. Attacks cannot work. |" in card
    assert "| transfer | not measured |" in card
    assert "gradient masking" not in make()
