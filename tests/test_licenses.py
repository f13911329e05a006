import pytest

from arrest_hub.licenses import PERMISSIVE, RESTRICTIVE, License, choose_license, license_of_card, license_problems

OTHER = License("other", "My licence", "LICENSE.md")


@pytest.mark.parametrize("given", [(None, None, None), ("mit", None, None), ("other", "My licence", "LICENSE.md")])
def test_a_whole_licence_is_no_problem(given):
    assert license_problems(*given) == []


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("apache2.0", "apache-2.0"), ("MIT", "mit"), ("my-very-own", None), ("cc-by-nc-sa", "cc-by-nc-")],
)
def test_an_id_the_hub_does_not_list_is_named_with_the_nearest(typed, meant):
    (problem,) = license_problems(typed, None, None)
    assert f"--license {typed!r}" in problem
    assert ("Did you mean" in problem) == (meant is not None)
    assert meant is None or f"'{meant}" in problem


@pytest.mark.parametrize("given", [(None, None), ("My licence", None), (None, "LICENSE.md"), ("", "LICENSE.md")])
def test_other_needs_a_name_and_a_link(given):
    (problem,) = license_problems("other", *given)
    assert "--license-name" in problem
    assert "--license-link" in problem


@pytest.mark.parametrize("license", [None, "mit"])
def test_a_name_or_a_link_belongs_to_other(license):
    (problem,) = license_problems(license, "My licence", None)
    assert problem.startswith("--license-name belongs to --license other")
    (problem,) = license_problems(license, None, "LICENSE.md")
    assert problem.startswith("--license-link belongs to --license other")


def test_every_problem_of_a_licence_is_told():
    assert len(license_problems("mitt", "My licence", "LICENSE.md")) == 2


def test_no_licence_is_both_permissive_and_restrictive():
    assert not PERMISSIVE & RESTRICTIVE
    assert {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0"} <= PERMISSIVE
    assert {"other", "gpl-3.0", "agpl-3.0", "cc-by-nc-4.0", "cc-by-sa-4.0", "openrail", "llama3"} <= RESTRICTIVE


@pytest.mark.parametrize(
    ("header", "license"),
    [
        ({"license": "mit"}, License("mit")),
        ({"license": "Apache-2.0"}, License("apache-2.0")),
        ({"license": "Mine"}, License("Mine")),
        ({"license": ["mit"]}, License("mit")),
        ({"license": ["mit", "apache-2.0"]}, License("mit, apache-2.0")),
        ({"license": "other", "license_name": "My licence", "license_link": "LICENSE.md"}, OTHER),
        ({"license": "other", "license_name": 3}, License("other", "3")),
        ({"license": "unknown"}, None),
        ({"license": "Unknown"}, None),
        ({"license": "none"}, None),
        ({"license": None}, None),
        ({"license": []}, None),
        ({"license_name": "My licence"}, None),
        ({}, None),
    ],
)
def test_the_licence_that_a_card_states(header, license):
    assert license_of_card(header) == license


def test_the_licence_that_is_given_wins():
    for base in (None, License("mit"), License("cc-by-nc-4.0")):
        assert choose_license(OTHER, base, "org/base") == (OTHER, None)
    assert choose_license(OTHER, None, None) == (OTHER, None)


@pytest.mark.parametrize("license", ["apache-2.0", "mit", "cc-by-4.0"])
def test_a_permissive_licence_is_taken_over(license):
    assert choose_license(None, License(license), "org/base") == (License(license), None)


def refusal(base_license, base_name):
    chosen, problem = choose_license(None, base_license, base_name)
    assert chosen is None
    assert "--license" in problem
    return problem


def test_a_licence_is_asked_for_where_none_can_be_taken_over():
    assert "no base model" in refusal(None, None)
    missing = refusal(None, "org/base")
    assert "org/base" in missing
    assert "states none" in missing


def test_conditions_on_derived_models_have_to_be_read_first():
    problem = refusal(License("cc-by-nc-4.0"), "org/base")
    assert "org/base is under cc-by-nc-4.0" in problem
    assert "--license cc-by-nc-4.0" in problem
    assert "other (My licence)" in refusal(OTHER, "org/base")


@pytest.mark.parametrize("license", ["my-own", "mit, apache-2.0", "MIT"])
def test_a_licence_the_hub_does_not_list_is_not_taken_over(license):
    problem = refusal(License(license), "org/base")
    assert f"is under {license}, which is not one" in problem
    assert "--license other" in problem, "one that `license_problems` accepts"
