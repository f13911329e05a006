import json

import pytest

from arrest_hub.errors import ConfigError
from arrest_hub.results import Check, EvalReport, Result
from arrest_hub.robustbench import (
    STANDARD_PARTS,
    eps_text,
    missing_fields,
    robustbench_dataset,
    robustbench_entry,
    robustbench_problems,
    write_robustbench,
)


def make(
    dataset="cifar10", *, n=10_000, split="test", norm="linf", eps="8/255", parts=STANDARD_PARTS, after=(), clean=8686,
    robust=5709, architecture="resnet18_cifar", **changes,
):  # fmt: skip
    place = {"n": n, "dataset": dataset, "split": split, "seed": 0, "seconds": 1.0}
    parameters = {"parts": [{"name": part} for part in parts]} | ({"after": list(after)} if after else {})
    rows = [
        Result("clean_accuracy", None, None, None, clean, **place),
        Result("robust_accuracy", "pgd-20", norm, eps, robust + 100, **place),
        Result("robust_accuracy", "autoattack", norm, eps, robust, attack_parameters=parameters, **place),
    ]
    return EvalReport(rows, model={"architecture": architecture} if architecture else {}, **changes)


def entry(*args, training=None, **kwargs):
    return robustbench_entry(make(*args, **kwargs), training=training)


def test_an_entry_as_robustbench_has_them():
    assert entry() == {
        "link": "", "name": "", "authors": "", "additional_data": None, "number_forward_passes": 1,
        "dataset": "cifar10", "venue": "", "architecture": "resnet18_cifar", "eps": "8/255", "clean_acc": "86.86",
        "reported": "57.09", "autoattack_acc": "57.09", "unreliable": False,
    }  # fmt: skip
    assert list(entry())[:5] == ["link", "name", "authors", "additional_data", "number_forward_passes"]


def test_accuracies_have_two_decimals():
    found = entry(clean=9000, robust=0)
    assert (found["clean_acc"], found["autoattack_acc"], found["reported"]) == ("90.00", "0.00", "0.00")
    assert entry(clean=1000, robust=333, n=3000, split="test")["autoattack_acc"] == "11.10"


def test_what_is_missing_is_said():
    assert missing_fields(entry()) == ["link", "name", "authors", "venue", "additional_data"]
    assert missing_fields(entry(architecture=None)) == [
        "link", "name", "authors", "venue", "additional_data", "architecture",
    ]  # fmt: skip
    whole = entry() | {"link": "l", "name": "n", "authors": "a", "venue": "v", "additional_data": False}
    assert missing_fields(whole) == []


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [("cifar10", "cifar10"), ("uoft-cs/cifar10", "cifar10"), ("uoft-cs/cifar10:plain_text@abc", "cifar10"),
     ("cifar10@main", "cifar10"), ("/data/CIFAR-10/", "cifar10"), ("./cifar100", "cifar100"),
     ("uoft-cs/cifar100", "cifar100"), ("imagenet", "imagenet"), ("ILSVRC/imagenet-1k", "imagenet"),
     ("digits", None), ("cifar10c", None), ("my/cifar10-noisy", None), ("/cifar10/other", None), ("", None)],
)  # fmt: skip
def test_datasets(dataset, expected):
    assert robustbench_dataset(dataset) == expected


@pytest.mark.parametrize(
    ("norm", "eps", "expected"),
    [("linf", "8/255", "8/255"), ("linf", "16/510", "8/255"), ("linf", "0.03", "0.03"), ("linf", "1/51", "5/255"),
     ("l2", "0.5", "0.5"), ("l2", "1/2", "0.5"), ("l2", "3", "3.0"), ("l2", "128/255", "128/255")],
)  # fmt: skip
def test_radii(norm, eps, expected):
    assert eps_text(norm, eps) == expected


def test_norm_l2():
    found = entry(norm="l2", eps="1/2")
    assert found["eps"] == "0.5"
    assert "footnote" not in found
    assert "leaderboard is 0.5" in entry(norm="l2", eps="128/255")["footnote"]
    assert "no cifar100 leaderboard for l2" in entry("cifar100", norm="l2", eps="0.5")["footnote"]


@pytest.mark.parametrize(
    ("training", "note"),
    [({"method": "arrest", "model": "timm/x"}, "It is finetuned by ARREST (arXiv 2308.16454) from timm/x."),
     ({"method": "arrest", "model": "/home/me/runs/x"}, "It is finetuned by ARREST (arXiv 2308.16454) from x."),
     ({"method": "arrest", "model": "timm/x", "init": "random"},
      "It is trained from random weights by ARREST (arXiv 2308.16454) with timm/x as the standard teacher."),
     ({"method": "at", "model": "timm/x"}, "It is finetuned by adversarial training from timm/x."),
     ({"method": "trades", "model": "timm/x"}, "It is finetuned by TRADES (arXiv 1901.08573) from timm/x.")],
)  # fmt: skip
def test_how_it_was_trained(training, note):
    assert entry(training=training)["footnote"] == note
    assert missing_fields(entry(training=training))[-1] == "additional_data"


@pytest.mark.parametrize("training", [None, {}, {"method": "other", "model": "x"}, {"method": "arrest"}])
def test_unknown_training_is_not_guessed(training):
    assert "footnote" not in entry(training=training)


def test_fewer_or_other_images_are_said():
    assert entry(n=9999)["footnote"] == (
        "Evaluated on 9,999 images of the split 'test'; RobustBench uses the 10,000 test images."
    )
    assert "split 'train'" in entry(split="train")["footnote"]
    found = entry("imagenet", n=5000, split="validation", eps="4/255", robust=2000, clean=4000)
    assert "5,000 validation images of its own choice" in found["footnote"]


def test_settings_that_are_not_robustbenchs_are_said():
    assert "leaderboard is 8/255" in entry(eps="4/255")["footnote"]
    assert "Evaluated in bf16." in entry(precision="bf16")["footnote"]
    assert "footnote" not in entry(preprocessing={"size": [32, 32]})
    larger = entry(preprocessing={"size": [224, 224]})["footnote"]
    assert larger == "The images are resized to 224x224 and attacked there; RobustBench attacks them at 32x32."
    assert "up to 7.0 times weaker" in entry(norm="l2", eps="0.5", preprocessing={"size": [224, 224]})["footnote"]
    assert "resized" not in entry("imagenet", n=5000, split="val", eps="4/255", preprocessing={"size": [288, 288]}).get(
        "footnote", ""
    )
    assert "worst case together with PGD-20" in entry(after=["pgd-20"])["footnote"]


def test_warnings_make_it_unreliable():
    checks = [Check("noise", "warn", 0.5, "x"), Check("Square", "warn", 1.0, "y"), Check("fine", "pass", 0.0, "z")]
    found = entry(checks=checks, n=1000, clean=900, robust=500)
    assert found["unreliable"] is True
    assert found["footnote"].endswith("may be overestimated: noise; Square.")
    assert found["footnote"].startswith("Evaluated on 1,000")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"dataset": "digits"}, "no leaderboard for the dataset 'digits'"), ({"norm": "l1"}, "not for l1"),
     ({"parts": ("apgd-ce", "apgd-t")}, "without fab-t, square.*run `--attacks autoattack`"),
     ({"parts": ()}, "without")],
)  # fmt: skip
def test_what_gives_no_entry(changes, reason):
    with pytest.raises(ConfigError, match=reason):
        entry(**changes)


def test_every_reason_is_given_at_once():
    with pytest.raises(ConfigError) as caught:
        entry("digits", norm="l1", parts=())
    assert len(caught.value.problems) == 3


def test_without_autoattack_or_clean_accuracy():
    report = make()
    report.results = [row for row in report.results if row.attack != "autoattack"]
    with pytest.raises(ConfigError, match="run `--attacks autoattack`"):
        robustbench_entry(report, training=None)
    with pytest.raises(ConfigError, match="run `--attacks autoattack`"):
        robustbench_entry(EvalReport([]), training=None)
    report = make()
    report.results[0].n = 20_000  # of other images
    with pytest.raises(ConfigError, match="clean accuracy on the same images"):
        robustbench_entry(report, training=None)


def test_the_newest_figure_is_taken():
    report = make()
    report.results += make("cifar100", robust=2000, clean=6000).results
    found = robustbench_entry(report, training=None)
    assert (found["dataset"], found["clean_acc"], found["autoattack_acc"]) == ("cifar100", "60.00", "20.00")


def test_problems_are_known_before_the_evaluation():
    assert robustbench_problems("cifar10", "linf", ["pgd-20", "autoattack"]) == []
    assert len(robustbench_problems("digits", "l1", ["pgd-20"])) == 3


def test_the_file(tmp_path):
    path = tmp_path / "deep" / "entry.json"
    missing = write_robustbench(path, make(), training=None)
    assert json.loads(path.read_text()) == entry()
    assert missing == missing_fields(entry())
    assert [file.name for file in path.parent.iterdir()] == ["entry.json"]
    with pytest.raises(ConfigError):
        write_robustbench(tmp_path / "none.json", make("digits"), training=None)
    assert not (tmp_path / "none.json").exists()
