import dataclasses
import re
import time
from html.parser import HTMLParser

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from arrest_hub.card_facts import CardFacts, Publication, is_sealed, read_publication
from arrest_hub.config import FinetuneConfig
from arrest_hub.licenses import License, license_of_card
from arrest_hub.model_card import CITATIONS, card_is_generated, duration, render_card
from arrest_hub.results import Check, EvalReport, Result, one_line
from arrest_hub.training_record import BaseModel, TrainingData, TrainingRecord

REVISION, DATA_REVISION = "a1b2c3d4e5f6" + "0" * 28, "b" * 40
HUB_BASE = BaseModel("org/base", "timm", "resnet18_cifar", "org/base", REVISION, License("mit"), ["@misc{theirs}"])
LOCAL_BASE = BaseModel("my-base", "timm", "resnet18_cifar")
HUB_DATA = TrainingData("cifar10", "train", 10, 49000, "uoft-cs/cifar10", DATA_REVISION)
LOCAL_DATA = TrainingData("my-images", "train", 10, 49000)
CHECKS = [
    Check("more steps are never weaker", "pass", 0.0, "46 % stand PGD-20, 45 % PGD-60."),
    Check("share of zero gradients", "warn", 0.4, "40 % of the images. Attacks cannot work."),
    Check("transfer", "skipped", None, "Not measured: no teacher is known."),
]
PUBLISHED = Publication("me/robust", License("apache-2.0"))


def row(attack, correct, dataset="cifar10", split="test", **changes):
    kind = ("robust_accuracy", attack, "linf", "8/255") if attack else ("clean_accuracy", None, None, None)
    return dataclasses.replace(Result(*kind, correct, 1000, dataset, split, 7, 1.0), **changes)


def make(library="timm", architecture="resnet18_cifar", base=HUB_BASE, data=HUB_DATA, recorded=True, attacks=(),
         teacher=True, checks=(), figures=(), publication=PUBLISHED, labels=None, record=None, **changes):  # fmt: skip
    """The facts of a run on CIFAR-10; ``record`` changes its record, ``changes`` its configuration."""
    rows = [row(None, 866), row("pgd-20", 461), *(row(name, 437) for name in attacks)]
    report = EvalReport(
        rows, [row(None, 951), row("pgd-20", 3)] if teacher else [], hardware="1 x H100", checks=list(checks),
        versions={"torch": "2.12", "timm": "1.1"},
        model={"library": library, "architecture": architecture, "parameters": 11_173_962, "steps": 500},
    )  # fmt: skip
    command = "arrest-finetune --recipe cifar10_resnet18 --model 'org/base@main'"
    facts = TrainingRecord(base, data, command, 3828, 3828, 10.0, 11100.0, 1, "1 x A100", {"torch": "2.11"})
    config = FinetuneConfig(**({"model": "org/base", "dataset": "cifar10"} | changes))
    return CardFacts(
        report, yaml.safe_load(config.to_yaml()), dataclasses.replace(facts, **record or {}) if recorded else None,
        publication, list(figures), labels, len(labels) if labels else None,
    )  # fmt: skip


def header(card):
    return yaml.safe_load(card.split("\n---\n")[0])


def section(card, title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", card, re.MULTILINE | re.DOTALL)[1]


class Page(HTMLParser):
    """What a reader sees: the tags, and the text of every cell, piece of code, link and title."""

    def __init__(self, card):
        super().__init__()
        self.tags, self.open, self.texts = [], [], {"td": [], "code": [], "a": [], "h1": []}
        self.feed(MarkdownIt("commonmark", {"html": True}).enable("table").render(ModelCard(card).text))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag in self.texts:
            self.open.append(tag)
            self.texts[tag].append("")

    def handle_endtag(self, tag):
        if tag in self.texts:
            assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in set(self.open):
            self.texts[tag][-1] += data


def test_the_header_loads_with_the_hubs_own_class():
    data = ModelCard(render_card(make(attacks=["autoattack"]))).data
    assert data.library_name == "timm"
    assert data.pipeline_tag == "image-classification"
    assert data.license == "apache-2.0"
    assert data.base_model == "org/base"
    assert data.base_model_relation == "finetune"
    assert data.base_model_revision == REVISION
    assert data.datasets == ["uoft-cs/cifar10"]
    assert data.metrics == ["accuracy"]
    assert set(data.tags) == {"adversarial-robustness", "robust", "arrest-hub", "arrest", "linf", "linf-8/255"}
    assert data.model_name == "robust"
    assert data.license_name is None
    assert data.license_link is None


def test_the_figures_survive_the_header():
    clean, pgd, autoattack = ModelCard(render_card(make(attacks=["autoattack"]))).data.eval_results
    assert (clean.metric_value, pgd.metric_value, autoattack.metric_value) == (0.866, 0.461, 0.437)
    names = ["Clean accuracy", "Robust accuracy, PGD-20 (linf 8/255)", "Robust accuracy, AutoAttack (linf 8/255)"]
    assert [result.metric_name for result in (clean, pgd, autoattack)] == names
    assert {result.metric_type for result in (clean, pgd, autoattack)} == {"accuracy"}
    assert {key: value for key, value in clean.metric_args.items() if key != "ci95"} == {"n": 1000, "seed": 7}
    for result, attack in ((pgd, "pgd-20"), (autoattack, "autoattack")):
        args = dict(result.metric_args)
        low, high = args.pop("ci95")
        assert low < result.metric_value < high
        assert args == {"attack": attack, "norm": "linf", "eps": "8/255", "n": 1000, "seed": 7}
    for result in (clean, pgd, autoattack):
        assert (result.task_type, result.dataset_type, result.dataset_name) == (
            "image-classification", "uoft-cs/cifar10", "cifar10",
        )  # fmt: skip
        assert (result.dataset_split, result.dataset_revision) == ("test", DATA_REVISION)


@pytest.mark.parametrize("name", ["uoft-cs/cifar10:plain_text", "uoft-cs/cifar10:plain_text@v1"])
def test_the_configuration_of_a_dataset_is_named_without_its_revision(name):
    facts = make()
    facts.record.data = dataclasses.replace(facts.record.data, name=name)
    for result in facts.report.results:
        result.dataset = name
    results = ModelCard(render_card(facts)).data.eval_results
    assert {result.dataset_config for result in results} == {"plain_text"}


def test_figures_on_another_dataset_are_not_put_down_to_the_training_data():
    facts = make()
    facts.report.results.append(row(None, 700, dataset="other/images", split="validation"))
    results = ModelCard(render_card(facts)).data.eval_results
    (other,) = [result for result in results if result.dataset_name == "other/images"]
    assert (other.dataset_type, other.dataset_split, other.dataset_revision) == ("other/images", "validation", None)


def test_a_radius_stays_text_and_gives_the_common_tag():
    facts = make(norm="l2", eps="0.5")
    facts.report.results[1] = row("pgd-20", 461, norm="l2", eps="0.5")
    card = ModelCard(render_card(facts))
    assert card.data.eval_results[1].metric_args["eps"] == "0.5"
    assert {"l2", "l2-1/2"} <= set(card.data.tags)
    assert "**l2 norm at most 0.5**" in card.text


def test_what_is_unknown_is_left_out():
    card = render_card(make(base=LOCAL_BASE, data=LOCAL_DATA, publication=Publication()))
    assert set(header(card)) == {"library_name", "metrics", "pipeline_tag", "tags", "model-index"}
    assert "huggingface.co" not in card
    assert "starting from `my-base`" in card
    assert "`my-images`" in card
    assert header(card)["model-index"][0]["name"] == "resnet18_cifar-arrest-linf"
    assert "None" not in card


def test_another_licence_comes_with_its_name_and_link():
    data = ModelCard(render_card(make(publication=Publication("me/x", License("other", "mine", "LICENSE"))))).data
    assert (data.license, data.license_name, data.license_link) == ("other", "mine", "LICENSE")


def test_a_run_without_a_record_says_less():
    card = render_card(make(recorded=False))
    assert not {"base_model", "base_model_relation", "datasets"} & set(header(card))
    assert "500 steps." in section(card, "Training")
    assert "starting from" not in card
    assert "```bash" not in card
    assert "| hardware | – | 1 x H100 |" in card


def test_a_network_trained_from_nothing_has_no_base():
    card = render_card(make(base=None, standard_epochs=1))
    assert "trained on clean images for 1 epoch from a random initialisation" in card
    assert not {"base_model", "base_model_relation", "base_model_revision"} & set(header(card))
    assert "trained on clean images for 3 epochs from" in render_card(make(base=None, standard_epochs=3))
    assert "first finetuned on clean images for 3 epochs" in render_card(make(standard_epochs=3))
    assert "clean images" not in render_card(make())


def test_the_threat_model_stands_before_the_results():
    card = render_card(make(checks=CHECKS))
    assert re.findall("^## (.*)", card, re.MULTILINE) == [
        "Threat model", "Results", "How to use it", "Training", "Intended use and limits", "Citation",
    ]  # fmt: skip
    assert "**linf norm at most 8/255**" in section(card, "Threat model")
    assert not re.search(r"\d %", card.split("## Results")[0].split("\n---\n")[1])


def test_every_percentage_is_one_that_was_measured():
    card = render_card(make(attacks=["autoattack"]))
    results = section(card, "Results")
    assert "| model | clean | PGD-20 (linf 8/255) | AutoAttack (linf 8/255) |" in results
    assert "| teacher (standard) | 95.1 % [93.6, 96.3] | 0.3 % [0.1, 0.9] | – |" in results
    assert "| this model | 86.6 % [84.3, 88.6] | 46.1 % [43.0, 49.2] | 43.7 % [40.7, 46.8] |" in results
    accuracies = set(re.findall(r"([\d.]+) %(?! Wilson)", card.split("\n---\n")[1]))
    assert accuracies == {"95.1", "0.3", "86.6", "46.1", "43.7"}
    assert "On 1,000 images of `cifar10`, split `test`" in results


def test_the_first_row_is_explained_where_there_is_one():
    assert "The first row is the standardly trained network" in render_card(make())
    alone = render_card(make(teacher=False))
    assert "first row" not in alone
    assert "teacher (standard)" not in alone
    assert "| before (standard) |" in render_card(make(method="trades")), "TRADES has no teacher"


def test_the_facts_of_training_are_told():
    facts = make(record={"base": HUB_BASE})
    training = section(render_card(facts), "Training")
    assert "3,828 steps (10 epochs) on 49,000 images of\n[`cifar10`](" in training
    assert f"/datasets/uoft-cs/cifar10/tree/{DATA_REVISION}) at commit `{'b' * 12}`, split `train`" in training
    assert "in 3 h 05 min on 1 x A100." in training
    assert "| torch | 2.11 | 2.12 |" in training
    assert "| timm | – | 1.1 |" in training
    assert "| hardware | 1 x A100 | 1 x H100 |" in training
    card = render_card(facts)
    assert f"[`org/base`](https://huggingface.co/org/base/tree/{REVISION}) at commit `a1b2c3d4e5f6`" in card
    assert "`resnet18_cifar` with 11.17 M parameters" in card


def test_a_stream_of_unknown_length_and_part_of_an_epoch():
    data = dataclasses.replace(LOCAL_DATA, num_examples=None)
    card = render_card(make(data=data, record={"epochs": 0.25, "seconds": 42}))
    assert "(0.25 epochs) on a stream of" in card
    assert "in 42 s on" in card


def test_the_chosen_step_is_told_where_it_is_not_the_last():
    assert "Published are the weights" not in render_card(make())
    for validation, where in (
        (None, "in validation"), ("train[held-out validation]", "on training images that were held out"),
        ("train[held-out validation][500]", "on training images that were held out"),
        ("val", "on split `val`"), ("val[500]", "on split `val`"),
    ):  # fmt: skip
        data = dataclasses.replace(LOCAL_DATA, validation=validation)
        card = render_card(make(data=data, record={"exported_step": 1200}))
        assert f"weights after step 1,200, which did best {where}." in card


def test_the_command_stands_in_a_block_of_its_own():
    card = render_card(make())
    assert "\n```bash\narrest-finetune --recipe cifar10_resnet18 --model 'org/base@main'\n```\n" in card


def test_warnings_are_named_before_the_results_and_every_check_is_in_the_table():
    card = render_card(make(checks=CHECKS))
    warning = section(card, "Threat model")
    assert "**Warning.** 1 of the checks raises doubts" in warning
    assert "(share of zero gradients); see [the checks](#is-it-gradient-masking)" in warning
    results = section(card, "Results")
    assert "| more steps are never weaker | pass | 46 % stand PGD-20, 45 % PGD-60. |" in results
    assert "| share of zero gradients | **warn** | 40 % of the images. Attacks cannot work. |" in results
    assert "| transfer | not measured | Not measured: no teacher is known. |" in results
    twice = render_card(make(checks=[CHECKS[1], dataclasses.replace(CHECKS[1], name="noise")]))
    assert "2 of the checks raise doubts" in twice
    assert "(share of zero gradients; noise)" in twice


def test_without_warnings_or_checks_none_are_shown():
    fine = render_card(make(checks=[CHECKS[0], CHECKS[2]]))
    assert "**Warning.**" not in fine
    assert "### Is it gradient masking?" in fine
    none = render_card(make())
    assert "Signs of gradient masking were not looked for" in none
    assert "### Is it gradient masking?" not in none
    chance = Check("clean accuracy above chance", "warn", 0.1, "10 % of 10 classes.")
    for checks in ([chance], [chance, CHECKS[2]]):  # the check that arrest-finetune makes tells nothing of gradients
        card = render_card(make(checks=checks))
        assert "(clean accuracy above chance); see [the checks](#checks)" in card
        assert "### Checks\n\n| check | | finding |" in card
        assert card.count("Signs of gradient masking were not looked for") == 1
        assert "Is it gradient masking?" not in card


def test_the_absence_of_autoattack_is_told_and_its_presence_cited():
    without, with_it = render_card(make()), render_card(make(attacks=["autoattack"]))
    assert "AutoAttack was not run" in section(without, "Results")
    assert "croce2020reliable" not in without
    assert "AutoAttack was not run" not in with_it
    assert CITATIONS["autoattack"] in with_it


@pytest.mark.parametrize(
    ("method", "key"), [("arrest", "suzuki2023"), ("at", "madry2018"), ("trades", "zhang2019")]
)  # fmt: skip
def test_the_method_and_the_base_are_cited(method, key):
    card = render_card(make(method=method))
    citations = section(card, "Citation")
    assert re.findall(r"```bibtex\n@\w+\{([a-z]+\d*)", citations) == [key, "theirs"]
    assert header(card)["tags"][3] == method
    assert CITATIONS[method] in citations
    assert "theirs" not in render_card(make(method=method, base=LOCAL_BASE))
    ours = dataclasses.replace(LOCAL_BASE, citations=[CITATIONS[method], "@misc{theirs, title = {T}}"])
    both = section(render_card(make(method=method, base=ours)), "Citation")
    assert re.findall(r"@\w+\{([a-z]+\d*)", both) == [key, "theirs"], "a base model of ours cites the same"


def test_usage_with_timm():
    usage = section(render_card(make()), "How to use it")
    assert 'timm.create_model("hf-hub:me/robust", pretrained=True)' in usage
    assert 'arrest_hub.load("me/robust")' in usage
    assert "import arrest_hub.architectures  # registers" in usage
    assert "transformers" not in usage
    plain = section(render_card(make(architecture="resnet18")), "How to use it")
    assert "arrest_hub.architectures" not in plain
    assert "\n```python\nimport timm\n" in plain


def test_usage_with_transformers():
    usage = section(render_card(make("transformers", "ViTForImageClassification")), "How to use it")
    assert 'AutoImageProcessor.from_pretrained("me/robust")' in usage
    assert 'AutoModelForImageClassification.from_pretrained("me/robust")' in usage
    assert 'arrest_hub.load("me/robust")' in usage
    assert "timm" not in usage
    assert "arrest_hub.architectures" not in usage


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_usage_of_what_is_not_published_names_a_folder(library):
    usage = section(render_card(make(library, publication=Publication())), "How to use it")
    assert "path/to/this/folder" in usage
    assert "hf-hub:" not in usage
    for block in re.findall(r"```python\n(.*?)```", usage, re.DOTALL):
        compile(block, "card", "exec")


def test_hyper_parameters_that_differ_and_all_of_them():
    card = render_card(make(lr=0.3, replay_threshold=None, model_args={"channels": [4, 8]}, streaming=True))
    differing, whole = section(card, "Training").split("<details>")
    assert differing.count("\n| `") == 4
    for line in ("| `lr` | `0.3` |", "| `replay_threshold` | `none` |", "| `model_args` | `{channels: [4, 8]}` |",
                 "| `streaming` | `true` |"):  # fmt: skip
        assert line in differing
        assert line in whole
    assert "| `eps` | `8/255` |" in whole
    assert whole.count("\n| `") == len(dataclasses.fields(FinetuneConfig))
    assert "| nothing | |" in render_card(make())
    assert "| nothing | |" not in card


def test_pictures_are_shown_where_they_belong_if_they_are_there():
    card = render_card(make(figures=["eps_curve.png", "training.png"]))
    assert "](figures/eps_curve.png)" in section(card, "Results")
    assert "](figures/training.png)" in section(card, "Training")
    assert card.count("](figures/") == 2


def test_at_most_20_labels_are_shown():
    card = render_card(make(labels=[f"n{number}" for number in range(21)]))
    assert "21 classes: `n0`, `n1`, " in card
    assert "`n19`, ...." in card
    assert "`n20`" not in card
    card = render_card(make(labels=[f"n{number}" for number in range(20)]))
    assert "`n18`, `n19`." in card
    assert "classes" not in render_card(make())
    unnamed = make()
    unnamed.num_classes = 1234
    assert "\n1,234 classes.\n" in render_card(unnamed)


def test_many_labels_make_no_large_card():
    facts = make(labels=[f"n{number:08d} a synset, its synonym" for number in range(21_000)])
    started = time.perf_counter()
    card = render_card(facts)
    assert time.perf_counter() - started < 2
    assert len(card.encode()) < 60_000
    assert "21,000 classes" in card


def test_equal_facts_give_equal_text():
    facts = {"checks": CHECKS, "attacks": ["autoattack"], "labels": ["a", "b"]}
    assert render_card(make(**facts)) == render_card(make(**facts))


def test_a_card_is_generated_until_somebody_edits_it(tmp_path):
    assert card_is_generated(tmp_path), "there is none"
    path = tmp_path / "README.md"
    card = render_card(make())
    path.write_text(card, encoding="utf-8")
    assert card_is_generated(tmp_path)
    for edited in (card + "One more thing.\n", card.replace("apache-2.0", "mit", 1), "# My own\n", ""):
        path.write_text(edited, encoding="utf-8")
        assert not card_is_generated(tmp_path)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (5900, "98 min"), (6000, "1 h 40 min"), (11100, "3 h 05 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


NASTY = [
    'say "hi"', "it's", "`", "a`b", "```", "a ``` b ```` c", "``` \n## Title", "x|y", "|", "\\", "a\\|b", "`|`\\`",
    "a: b", ": b", "a #b", "a\n---\nb", "\n---\n", "a\n\n## Title\n\nb", "a\r\nb\tc\u2028d", "~~~", "&lt;b&gt; &amp;",
    "<script>alert(1)</script>", "</details>", "<!-- c", "-->", "</code></td>", "{{ 7*7 }}", "{% raw %}", "{# c #}",
    "\U0001f98a \U0001f1e9\U0001f1ea", "\u202eabc\u202c", "\u200fabc", "\x00\x1b[31m", "w" * 3000, "w| `" * 500,
    "@me", "# title", "- item", "1. item", "> said", "* * *", "*b* _c_ __d__", "[x](y)", "[x]", "a](b) [c", "![i](u)",
    "$a$", "null", "~", "true", "1.0", "2020-01-01", "!!python/name:os", "&anchor", "*alias", "%TAG", "? a", "=",
    "<!-- Made by arrest-hub; id: evil/x; digest: none -->",
]  # fmt: skip


def nasty_card(text, link=False):
    """A card with ``text`` wherever a user's text can come to stand."""
    base = dataclasses.replace(LOCAL_BASE, name=text, citations=[text])
    data = TrainingData(text, text, 3, 500, *(("me/data", DATA_REVISION) if link else ()))
    facts = make(
        base=base, data=data, checks=[Check(text, "warn", 0.4, text), CHECKS[0]], labels=[text, "plain", text],
        publication=Publication("me/robust", License("other", text, text)), model_args={"a": text, "b": [text]},
        model=text, dataset=text, optimizer=text, record={"command": text, "hardware": text, "versions": {text: text}},
    )  # fmt: skip
    facts.report.hardware = text
    facts.report.results = [row(None, 866, text, text), row("pgd-20", 461, text, text), row(None, 7, "other", text)]
    return render_card(facts)


def replaced(value, old, new):
    if isinstance(value, dict):
        return {key: replaced(item, old, new) for key, item in value.items()}
    if isinstance(value, list):
        return [replaced(item, old, new) for item in value]
    return new if value == old else value


PLAIN = {link: nasty_card("PLAIN", link) for link in (False, True)}
PLAIN_PAGE = {link: Page(card) for link, card in PLAIN.items()}
IN_LINKS = ["a](b) [c", "[x]", "x](y)", "![i](u)", "]", "\\", "a`b", "<b>", "a\n\nb"]


@pytest.mark.parametrize(
    ("text", "link"),
    [*((text, False) for text in NASTY), *((text, True) for text in IN_LINKS)],
    ids=lambda value: ascii(value)[1:20],
)
def test_text_of_users_breaks_neither_header_nor_page(text, link):
    card, shown, plain = nasty_card(text, link), one_line(text), PLAIN_PAGE[link]
    # a licence whose name has no character to show is one without a name
    expected = {key: value for key, value in replaced(header(PLAIN[link]), "PLAIN", shown).items() if value != ""}
    assert header(card) == expected
    data = ModelCard(card).data
    assert [result.metric_value for result in data.eval_results] == [0.866, 0.461, 0.007]
    assert (data.license, data.license_name) == ("other", shown or None)
    page = Page(card)
    assert page.tags == plain.tags, "no element more, none less, none of another kind"
    assert page.texts["h1"] == ["robust"]
    for tag in ("td", "a"):
        for seen, usual in zip(page.texts[tag], plain.texts[tag], strict=True):
            if "{a:" not in usual:
                assert seen.strip() == usual.replace("PLAIN", shown).strip()
    for seen, usual in zip(page.texts["code"], plain.texts["code"], strict=True):
        if usual == "PLAIN\n":  # the command and the citation are shown as they are
            assert seen == text.replace("\r\n", "\n").replace("\0", "\ufffd") + "\n"
        elif "{a:" in usual:
            values = yaml.safe_load(seen)
            assert one_line(values["a"]) == one_line(values["b"][0]) == shown
        else:
            assert seen.strip() == usual.replace("PLAIN", shown).strip()
    assert is_sealed(card)
    assert read_publication(card) == Publication("me/robust", license_of_card(expected))


def test_a_student_that_began_at_random_was_not_finetuned_from_its_teacher():
    card = render_card(make(init="random"))
    assert not {"base_model", "base_model_relation", "base_model_revision"} & set(header(card))
    assert "starting from a random initialisation; its teacher was [`org/base`]" in card
    assert "starting from a random initialisation." in render_card(make(init="random", base=None, method="at"))
    taught = render_card(make(init="random", base=None, standard_epochs=2))
    assert "its teacher is the same architecture after 2 epochs on clean images" in taught
    assert "starting from" not in render_card(make(recorded=False, standard_epochs=2)), "there is no record of it"
