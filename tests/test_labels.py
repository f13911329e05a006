"""match_labels: agree, remap by name, or an error that says what to type."""

import pytest

from arrest_hub.errors import ConfigError
from arrest_hub.labels import match_labels


def test_equal_names_however_written():
    match = match_labels(["Golden_Retriever", "tabby cat"], 2, ["golden retriever", "Tabby-Cat"], 2)
    assert match.order is None
    assert "agree" in match.note


@pytest.mark.parametrize(("data", "model"), [(None, ["a", "b"]), (["a", "b"], None), (None, None)])
def test_unnamed_side_is_matched_by_index(data, model):
    match = match_labels(data, 2, model, 2)
    assert match.order is None
    assert "no class names" in match.note
    with pytest.raises(ConfigError, match="--label-match index"):
        match_labels(data, 2, model, 2, mode="name")


def test_other_order_is_an_error_until_asked_for():
    data, model = ["cat", "dog", "bird"], ["dog", "bird", "cat"]
    with pytest.raises(ConfigError, match="'cat' is label 0 but output 2") as error:
        match_labels(data, 3, model, 3)
    assert "--label-match name" in str(error.value)
    assert "--label-match index" in str(error.value)
    order = match_labels(data, 3, model, 3, mode="name").order
    assert order is not None
    assert [model[o] for o in order] == data
    assert match_labels(data, 3, model, 3, mode="index").order is None


@pytest.mark.parametrize("mode", ["auto", "name"])
def test_other_names(mode):
    with pytest.raises(ConfigError, match="1: 'dog' against 'wolf'") as error:
        match_labels(["cat", "dog"], 2, ["cat", "wolf"], 2, mode=mode)
    assert "--standard-epochs" in str(error.value)


def test_repeated_names_are_not_remapped():
    with pytest.raises(ConfigError, match="differ"):
        match_labels(["crane", "crane", "x"], 3, ["crane", "x", "crane"], 3, mode="name")


@pytest.mark.parametrize(
    ("data", "model"),
    [(list("ABab"), list("abAB")), (["11", "1-1", "Cat"], ["1-1", "11", "cat"]), (["A", "a", "b"], ["a", "A", "b"])],
)
def test_names_that_differ_in_case_or_hyphens_alone_are_different_classes(data, model):
    assert match_labels(data, len(data), data, len(data)).order is None
    with pytest.raises(ConfigError, match="in another order"):
        match_labels(data, len(data), model, len(model))
    order = match_labels(data, len(data), model, len(model), mode="name").order
    assert order is not None
    assert [model[o].lower() for o in order] == [name.lower() for name in data]
    assert [model[o] for o in order][:2] == data[:2]


def test_names_that_differ_in_case_on_one_side_alone_are_compared_exactly():
    with pytest.raises(ConfigError, match="1: 'a' against 'A-'"):
        match_labels(["A", "a"], 2, ["A", "A-"], 2, mode="name")


def test_a_repeated_name_agrees_however_written():
    assert match_labels(["crane", "black bear", "crane"], 3, ["Crane", "Black_Bear", "Crane"], 3).order is None


@pytest.mark.parametrize("mode", ["auto", "name", "index"])
def test_other_counts(mode):
    with pytest.raises(ConfigError, match=r"10 classes and the model 1000 outputs.*--standard-epochs"):
        match_labels(None, 10, None, 1000, mode=mode)


def test_unknown_mode():
    with pytest.raises(ConfigError, match="Did you mean 'name'"):
        match_labels(None, 2, None, 2, mode="names")
