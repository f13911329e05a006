import dataclasses
import json

import pytest
import yaml

from arrest_hub.card_facts import (
    CardFacts,
    Publication,
    card_citations,
    card_header,
    is_sealed,
    publication_mark,
    read_publication,
    seal,
    threat_tags,
)
from arrest_hub.config import FinetuneConfig
from arrest_hub.licenses import License
from arrest_hub.results import EvalReport, Result
from arrest_hub.training_record import BaseModel, TrainingData, TrainingRecord

TIMM = {"architecture": "resnet18", "num_classes": 3, "label_names": ["dark", "middle", "light"]}
RECORD = TrainingRecord(
    BaseModel("org/base", "timm", "resnet18", "org/base", "a" * 40, License("mit"), ["@misc{a}"]),
    TrainingData("digits", "train", 3, 500), "arrest-finetune --recipe quickstart", 20, 10, 2.5, 61.0, 1, "1 x CPU",
    {"torch": "2.11"},
)  # fmt: skip
REPORT = EvalReport(
    [Result("clean_accuracy", None, None, None, 90, 100, "digits", "test", 0, 1.0)],
    model={"library": "timm", "architecture": "resnet18", "parameters": 9, "steps": 20},
)


def write_folder(folder, config=TIMM, record=RECORD, figures=()):
    (folder / "figures").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "training_config.yaml").write_text(FinetuneConfig(model="m", dataset="digits", lr=0.3).to_yaml())
    REPORT.write(folder / "results.json")
    if record is not None:
        record.write(folder / "training_record.json")
    for name in figures:
        (folder / "figures" / name).touch()
    return folder


def test_a_folder_is_read_as_it_was_written(tmp_path):
    facts = CardFacts.from_folder(write_folder(tmp_path / "export", figures=("gallery.png", "eps_curve.png", "x.png")))
    assert facts.report == REPORT
    assert facts.record == RECORD
    assert facts.training["lr"] == 0.3
    assert facts.figures == ["eps_curve.png", "gallery.png"], "the known ones, in the card's order"
    assert (facts.label_names, facts.num_classes) == (["dark", "middle", "light"], 3)
    assert facts.publication == Publication()


def test_the_publication_that_is_given_is_kept(tmp_path):
    publication = Publication("me/x", License("mit"))
    facts = CardFacts.from_folder(write_folder(tmp_path / "export"), publication)
    assert facts.publication == publication


def test_a_folder_from_before_there_was_a_record(tmp_path):
    assert CardFacts.from_folder(write_folder(tmp_path / "export", record=None)).record is None


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"id2label": {"2": "c", "0": "a", "1": "b"}}, (["a", "b", "c"], 3)),
        ({"id2label": {str(i): f"n{i}" for i in (10, 9, *range(9))}}, ([f"n{i}" for i in range(11)], 11)),
        ({"id2label": {"1": "LABEL_1", "0": "LABEL_0"}}, (None, 2)),
        ({"id2label": {"1": "LABEL_0", "0": "LABEL_1"}}, (["LABEL_1", "LABEL_0"], 2)),
        ({"label_names": [0, 1, 2], "num_classes": 3}, (["0", "1", "2"], 3)),
        ({"num_classes": 7}, (None, 7)),
        ({"label_names": [], "num_classes": 7}, (None, 7)),
        ({}, (None, None)),
    ],
)
def test_class_names_come_in_the_order_of_their_numbers(tmp_path, config, expected):
    facts = CardFacts.from_folder(write_folder(tmp_path / "export", config))
    assert (facts.label_names, facts.num_classes) == expected


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", "{"), ("config.json", "[]"), ("config.json", '{"id2label": {"first": "a"}}'),
        ("config.json", '{"label_names": "abc"}'), ("config.json", '{"label_names": 5}'),
        ("training_config.yaml", "lr: ["), ("training_config.yaml", "- lr"), ("training_config.yaml", ""),
        ("training_config.yaml", "lr: 0.3"),
        ("results.json", "{"), ("results.json", "{}"), ("results.json", "[]"),
        ("results.json", '{"format": 1, "results": [], "teacher_results": []}'),
        ("results.json", '{"format": 1, "results": [{"n": 3}], "teacher_results": []}'),
        ("training_record.json", "{"), ("training_record.json", '{"format": 1}'),
    ],
)  # fmt: skip
def test_a_damaged_file_is_a_value_error(tmp_path, name, text):
    folder = write_folder(tmp_path / "export")
    (folder / name).write_text(text)
    with pytest.raises(ValueError):
        CardFacts.from_folder(folder)


@pytest.mark.parametrize("name", ["config.json", "training_config.yaml", "results.json"])
def test_a_missing_file_is_an_os_error(tmp_path, name):
    folder = write_folder(tmp_path / "export")
    (folder / name).unlink()
    with pytest.raises(OSError, match=name):
        CardFacts.from_folder(folder)


def test_the_name_is_the_one_on_the_hub_or_says_what_was_done():
    facts = CardFacts(REPORT, dataclasses.asdict(FinetuneConfig(method="at", norm="l2")))
    assert facts.name == "resnet18-at-l2"
    assert dataclasses.replace(facts, publication=Publication("me/my-model")).name == "my-model"
    assert dataclasses.replace(facts, publication=Publication("my-model")).name == "my-model"


def test_changed_parameters_are_those_that_differ_from_the_defaults():
    config = FinetuneConfig(model="m", dataset="d", recipe="r", lr=0.3, replay_threshold=None, model_args={"a": 1},
                            streaming=True)  # fmt: skip
    training = yaml.safe_load(config.to_yaml()) | {"of_another_version": 1}
    changed = CardFacts(REPORT, training).changed_parameters()
    assert changed == {"model_args": {"a": 1}, "streaming": True, "replay_threshold": None, "lr": 0.3}
    assert CardFacts(REPORT, yaml.safe_load(FinetuneConfig().to_yaml())).changed_parameters() == {}


@pytest.mark.parametrize(
    ("norm", "eps", "tag"),
    [
        ("linf", "8/255", "linf-8/255"), ("linf", "16/510", "linf-8/255"), ("linf", "0.5", "linf-1/2"),
        ("linf", "1e-2", "linf-1/100"), ("linf", "0.2", "linf-51/255"),
        ("l2", "0.5", "l2-1/2"), ("l2", "1/2", "l2-1/2"), ("l2", "128/255", "l2-128/255"), ("l2", "3", "l2-3"),
        ("l2", "3.0", "l2-3"), ("l2", "51/255", "l2-1/5"),
    ],
)  # fmt: skip
def test_equal_radii_have_equal_tags(norm, eps, tag):
    assert threat_tags(norm, eps) == [norm, tag]


@pytest.mark.parametrize("repo_id", [None, "me/x", "x", "me.org/my-model_1.0"])
def test_the_mark_tells_the_id(repo_id):
    mark = publication_mark(Publication(repo_id))
    for text in (mark, seal(mark), f"# Title\r\n{mark}\r\n\r\ntext"):
        assert read_publication(text).repo_id == repo_id


def test_the_header_tells_the_licence():
    card = "---\nlicense: other\nlicense_name: My own\nlicense_link: LICENSE\n---\n" + publication_mark(
        Publication("me/x")
    )
    assert read_publication(card) == Publication("me/x", License("other", "My own", "LICENSE"))
    assert read_publication("# Another's card") == Publication()
    assert read_publication("") == Publication()


def test_a_mark_within_the_text_is_none():
    mark = publication_mark(Publication("me/x"))
    false = publication_mark(Publication("evil/y"))
    header = "---\n" + yaml.safe_dump({"license": "other", "license_name": f"name {false}"}) + "---\n"
    assert read_publication(f"{header}{mark}\n").repo_id == "me/x"
    assert read_publication(f"text {false}").repo_id is None
    assert not is_sealed(seal(f"text {false}"))


def test_a_sealed_card_is_known_until_it_is_edited():
    mark = publication_mark(Publication("me/x"))
    card = seal(f"---\nlicense: mit\n---\n{mark}\n\ntext\n")
    assert is_sealed(card)
    assert seal(card) == card
    assert is_sealed(card.replace("\n", "\r\n")), "git may change the ends of lines"
    for edited in (card + "\n", card.replace("mit", "isc"), card.replace("me/x", "me/y"), card.replace("text", "")):
        assert not is_sealed(edited)
    assert not is_sealed(f"{mark}\n\ntext\n"), "nobody sealed it"


@pytest.mark.parametrize(
    ("card", "header"),
    [
        ("---\nlicense: mit\n---\n# Title", {"license": "mit"}),
        ("---\r\nlicense: mit\r\n---\r\n# Title", {"license": "mit"}),
        ("\n\n--- \nlicense: mit\n---", {"license": "mit"}),
        ("---\na: 1\n---\ntext\n---\nb: 2\n---\n", {"a": 1}),
        ("---\na: x --- y\n---\n", {"a": "x --- y"}),
        ("# Title\n\n---\nlicense: mit\n---\n", {}),
        ("license: mit", {}),
        ("---\nlicense: mit\n", {}),
        ("---\nlicense: [mit\n---\n", {}),
        ("---\nlicense: mit\nlicense\n---\n", {}),
        ("---\n- mit\n---\n", {}),
        ("---\nmit\n---\n", {}),
        ("---\n!!python/object/apply:os.getcwd []\n---\n", {}),
        ("---\nreleased: 2020-13-45\n---\n", {}),
        ("---\n\n---\n", {}),
        ("", {}),
    ],
)
def test_the_header_of_a_card(card, header):
    assert card_header(card) == header


NESTED = "@article{a,\n  title = {The {{Deep}} {N}et},\n  year = {2020}\n}"


def test_citations_are_whole_entries_in_order():
    other = "@misc{b, title={B}}"
    card = f"# Title\n\n```bibtex\n{NESTED}\n```\ntext, me@home{{x}}\n\n   {other}   \n\n@inproceedings{{c}}"
    assert card_citations(card) == [NESTED, other, "@inproceedings{c}"]


def test_citations_are_at_most_so_many_and_none_twice():
    entries = [f"@misc{{n{number}}}" for number in range(9)]
    assert card_citations("\n".join(entries)) == entries[:5]
    assert card_citations("\n".join(entries), most=2) == entries[:2]
    assert card_citations("\n".join([*entries[:2], *entries[:3]])) == entries[:3]


def test_an_entry_that_does_not_end_is_left_out():
    assert card_citations("@misc{a, title = {A}\n\n# Title\n") == []
    assert card_citations(f"@misc{{a, title = {{A}}\n\n{NESTED}\n") == [NESTED]
    assert card_citations("@misc{a, note = {" + "x" * 5000 + "}}") == []


def test_spaces_at_the_ends_of_lines_make_no_other_entry():
    spaced = NESTED.replace("\n", "  \r\n")
    assert card_citations(f"{spaced}\n\n{NESTED}") == [NESTED]
