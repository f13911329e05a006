"""What a search makes of a card's header; searching itself is in test_hub_push.py."""

from types import SimpleNamespace

import pytest

from arrest_hub.errors import ConfigError
from arrest_hub.hub_search import _from_info, list_models


def found(*figures):
    """The model whose card states these accuracies, (attack or None, fraction)."""
    metrics = [{"type": "accuracy", "value": value, "args": {"attack": attack}} for attack, value in figures]
    header = {"model-index": [{"results": [{"metrics": [metric]} for metric in metrics]}]}
    card = SimpleNamespace(to_dict=lambda: header)
    return _from_info(
        SimpleNamespace(id="a/b", sha="0" * 40, library_name="timm", tags=[], downloads=1, card_data=card)
    )


@pytest.mark.parametrize(
    ("figures", "attack", "value"),
    [
        ([("autoattack", 0.4), ("pgd-20", 0.39)], "pgd-20", 0.39),
        ([("noise", 0.3), ("pgd-20", 0.4)], "pgd-20", 0.4),
        ([("pgd-20", 0.4), ("autoattack", 0.4)], "autoattack", 0.4),
        ([("noise", 0.3)], None, None),
        ([(20, 0.1), ("pgd-" + "9" * 5000, 0.4)], "pgd-" + "9" * 5000, 0.4),
        ([], None, None),
    ],
)
def test_the_robust_accuracy_is_the_lowest_and_never_noise(figures, attack, value):
    model = found((None, 0.8), *figures)
    assert (model.clean_accuracy, model.attack, model.robust_accuracy) == (0.8, attack, value)


def test_figures_of_one_dataset_and_radius_stand_together():
    def result(dataset, attack, value, eps="8/255"):
        args = {"attack": attack, "norm": "linf", "eps": eps} if attack else {}
        return {"dataset": {"type": dataset}, "metrics": [{"type": "accuracy", "value": value, "args": args}]}

    results = [
        result("b", "pgd-20", 0.2), result("a", None, 0.9), result("a", "autoattack", 0.4), result("a", "pgd-20", 0.45),
        result("a", "pgd-50", 0.3, "16/255"), result("b", None, 0.5),
    ]  # fmt: skip
    card = SimpleNamespace(to_dict=lambda: {"model-index": [{"results": results}]})
    model = _from_info(
        SimpleNamespace(id="a/b", sha="0" * 40, library_name="timm", tags=[], downloads=1, card_data=card)
    )
    assert (model.clean_accuracy, model.attack, model.robust_accuracy) == (0.9, "autoattack", 0.4)


def test_a_limit_is_a_number_of_models():
    for limit in (-1, 2.5, "3"):
        with pytest.raises(ConfigError, match="is no number of models"):
            list_models(limit=limit)


def test_a_dataset_that_no_card_lists_is_refused():
    for name in ("digits", "my-images", "/data/images", "uoft-cs/cifar10:plain_text", "uoft-cs/cifar10@main"):
        with pytest.raises(ConfigError, match=f"'{name}' is no id on the Hub"):
            list_models(dataset=name)
