import yaml

from arrest_hub.config import FinetuneConfig
from arrest_hub.model_card import CardFacts, render_card
from arrest_hub.results import EvalReport, Result


def make(library="timm", architecture="resnet18_cifar", **changes):
    rows = [
        Result("clean_accuracy", None, None, None, 866, 1000, "cifar10", "test", 0, 1.0),
        Result("robust_accuracy", "pgd-20", "linf", "8/255", 461, 1000, "cifar10", "test", 0, 1.0),
    ]
    training = yaml.safe_load(FinetuneConfig(model="m", dataset="cifar10", **changes).to_yaml())
    return render_card(CardFacts(library, architecture, 500, EvalReport(rows, hardware="1 x CPU"), training))


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
