"""The split an evaluation opens is the test split of a run, image for image, and the others are left alone."""

from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from test_data import encoded, identities, labelled, parquet, rows

from arrest_hub import splits
from arrest_hub.errors import DataError
from arrest_hub.on_demand import SplitsOnDemand
from arrest_hub.sources import Source
from arrest_hub.splits import EvalData, load_eval_split, load_splits
from arrest_hub.subsets import read_column

STRINGS = Features({"img": ImageFeature(), "y": Value("string")})
HIDDEN = {"y": [-1] * 6}


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Load with and without the other splits, each in a cache of its own -> the first, after comparing the two."""

    def same(dataset_id: str, **options) -> EvalData:
        found = load_eval_split(dataset_id, cache_dir=str(tmp_path / "apart"), **options)
        whole = load_splits(dataset_id, cache_dir=str(tmp_path / "whole"), **options)
        images = [[row[s.image_column] for row in s.dataset] for s in (found.split, whole.test)]
        assert images[0] == images[1]
        assert len(images[0]) == len(found.split) > 0
        assert found.split.labels() == whole.test.labels()
        assert found.split.row_array().tolist() == whole.test.row_array().tolist()
        assert (found.split.name, found.split.num_classes) == (whole.test.name, whole.num_classes)
        assert (found.class_names, found.num_classes) == (whole.class_names, whole.num_classes)
        assert (found.dataset_id, found.hub_id, found.revision) == (dataset_id, None, None)
        assert found.notes[0].startswith(f"test: {len(found.split):,} images of {found.split.name!r}")
        again = load_eval_split(dataset_id, cache_dir=str(tmp_path / "apart"), **options)
        assert again.split.labels() == found.split.labels()
        assert again.split.row_array().tolist() == found.split.row_array().tolist()
        return found

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "default")
    return same


def converted(tmp_path: Path) -> set[str]:
    """The splits that `load_eval_split` converted, by the names of the files."""
    return {file.stem.split("-")[1] for file in (tmp_path / "apart").rglob("*.arrow")}


@pytest.mark.parametrize("options", [{}, {"limit_eval": 37}, {"limit_eval": 37, "seed": 5}, {"eval_split": "train"}])
def test_digits(check, options):
    found = check("digits", **options)
    assert found.class_names == [str(i) for i in range(10)]
    assert any("no test" in note for note in found.notes) == ("eval_split" in options)


@pytest.mark.parametrize(
    ("options", "first", "count"),
    [
        ({}, 100, 12),
        ({"limit_eval": 5}, None, 5),
        ({"limit_eval": 5, "seed": 2}, None, 5),
        ({"limit_eval": 50}, 100, 12),
        ({"eval_split": "validation"}, 50, 6),
        ({"eval_split": "validation", "limit_eval": 3, "image_column": "img", "label_column": "y"}, None, 3),
    ],
)
def test_parquet(check, tmp_path, options, first, count):
    splits = {"train": rows(20), "validation": rows(6, start=50), "test": rows(12, start=100)}
    found = check(parquet(tmp_path / "d", **splits), **options)
    assert len(found.split) == count
    assert first in (None, identities(found.split)[0])
    assert converted(tmp_path) == {options.get("eval_split", "test")}, "no other split is converted"
    assert not any("every split" in note for note in found.notes)


@pytest.mark.parametrize("options", [{}, {"limit_eval": 4}])
def test_unlabelled_test_split(check, tmp_path, options):
    splits = {"train": rows(20), "validation": rows(6, start=50), "test": rows(6, start=100) | HIDDEN}
    found = check(parquet(tmp_path / "d", **splits), **options)
    assert set(identities(found.split)) <= set(range(50, 56))
    assert any("'test' is not used" in note for note in found.notes)
    assert converted(tmp_path) == {"test", "validation"}


@pytest.mark.parametrize("validation", [{}, {"validation": rows(6, start=50)}])
def test_test_split_that_is_empty_or_lacks_the_labels(check, tmp_path, validation):
    found = check(parquet(tmp_path / "empty", train=rows(60), test=rows(0), **validation))
    assert len(found.split) == 6
    data = {name: Dataset.from_dict(part, features=labelled()) for name, part in validation.items()}
    data["train"] = Dataset.from_dict(rows(60), features=labelled())
    data["test"] = Dataset.from_dict(rows(6, start=100), features=labelled()).remove_columns("y")
    DatasetDict(data).save_to_disk(tmp_path / "saved")
    found = check(str(tmp_path / "saved"))
    assert any("'test' is not used: it has no column 'y'" in note for note in found.notes)
    del data["train"]
    if validation:
        DatasetDict(data).save_to_disk(tmp_path / "no-train")
        assert identities(load_eval_split(str(tmp_path / "no-train")).split) == list(range(50, 56))


@pytest.mark.parametrize("options", [{}, {"seed": 3}, {"limit_eval": 3}])
@pytest.mark.parametrize("test", [{}, {"test": rows(6, start=100) | HIDDEN}])
def test_held_out_tenth(check, tmp_path, options, test):
    found = check(parquet(tmp_path / "d", train=rows(60), **test), **options)
    assert len(found.split) == options.get("limit_eval", 6)
    assert any("'train'" in note and "every split" in note for note in found.notes)
    assert any("6 images held out of 'train'" in note for note in found.notes)


def test_string_labels(check, tmp_path):
    """The class list is that of the train split, which has a class that the test split lacks."""
    train = rows(21) | {"y": ["dog", "cat", "ant"] * 7}
    test = rows(6, start=100) | {"y": ["dog", "cat"] * 3}
    found = check(parquet(tmp_path / "d", features=STRINGS, train=train, test=test))
    assert found.class_names == ["ant", "cat", "dog"]
    assert found.split.labels() == [2, 1] * 3
    assert any("every split" in note and "'y'" in note for note in found.notes)


@pytest.mark.parametrize("options", [{}, {"limit_eval": 3}])
@pytest.mark.parametrize("with_splits", [True, False])
def test_image_folder(check, tmp_path, with_splits, options):
    for part in ("train", "val") if with_splits else (".",):
        for number, name in enumerate(("cat", "dog")):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for i in range(20):
                (folder / f"{i}.png").write_bytes(encoded(100 * number + i, mode="RGB"))
    found = check(str(tmp_path / "images"), **options)
    assert found.class_names == ["cat", "dog"]
    assert found.split.name.startswith("val" if with_splits else "train[held-out test]")


def write_images(folder: Path, count: int = 6, **classes: int) -> None:
    for name, number in classes.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            (folder / name / f"{i}.png").write_bytes(encoded(number + i, mode="RGB"))


def test_image_folder_without_a_train_split(tmp_path):
    """The folders of splits are no classes."""
    write_images(tmp_path / "two" / "val", cat=0, dog=100)
    write_images(tmp_path / "two" / "Test", cat=20, fox=200)
    (tmp_path / "two" / "about" / "us").mkdir(parents=True)
    (tmp_path / "two" / "about" / "us" / "notes.txt").write_text("no image")
    found = load_eval_split(str(tmp_path / "two"))
    assert (found.class_names, found.split.name) == (["cat", "dog", "fox"], "test")
    assert found.split.labels() == [0] * 6 + [2] * 6
    assert load_eval_split(str(tmp_path / "two"), eval_split="val").split.labels() == [0] * 6 + [1] * 6
    with pytest.raises(DataError, match=r"no split named 'train'; choose one with --train-split: test, val"):
        load_splits(str(tmp_path / "two"))
    splits = load_splits(str(tmp_path / "two"), train_split="val", validation_size=0)
    assert (splits.train.name, splits.test.name) == ("val", "test")

    write_images(tmp_path / "one" / "val", count=20, cat=0, dog=100)
    assert len(load_eval_split(str(tmp_path / "one"), eval_split="val").split) == 40
    assert load_eval_split(str(tmp_path / "one")).class_names == ["cat", "dog"]
    write_images(tmp_path / "one", bird=50)
    with pytest.raises(DataError, match="val would be a split and bird a class"):
        load_eval_split(str(tmp_path / "one"), eval_split="val")


def test_class_folders_in_which_nothing_is_recognised_are_named(tmp_path):
    write_images(tmp_path / "d", count=20, cat=0, dog=100)
    (tmp_path / "d" / "fox").mkdir()
    (tmp_path / "d" / "fox" / "1.heic").write_bytes(b"an image of a format that Pillow does not read")
    notes = load_splits(str(tmp_path / "d")).notes
    assert any("no class: fox (such as 1.heic)" in note for note in notes)


@pytest.mark.parametrize("options", [{}, {"limit_eval": 3}, {"eval_split": "train"}])
def test_saved_to_disk(check, tmp_path, options):
    train, test = rows(20), rows(20, start=100)
    data = {
        "train": Dataset.from_dict(train, features=labelled()),
        "test": Dataset.from_dict(test, features=labelled()),
    }
    DatasetDict(data).save_to_disk(tmp_path / "both")
    data["train"].save_to_disk(tmp_path / "one")
    check(str(tmp_path / "both"), **options)
    check(str(tmp_path / "one"), **options)


def test_after_a_run_its_copy_is_used(tmp_path):
    folder = parquet(tmp_path / "d", train=rows(20), test=rows(6, start=100))
    load_splits(folder, cache_dir=str(tmp_path / "cache"))
    before = set((tmp_path / "cache").rglob("*.arrow"))
    load_eval_split(folder, cache_dir=str(tmp_path / "cache"))
    assert set((tmp_path / "cache").rglob("*.arrow")) == before


def test_in_the_same_cache_all_splits_are_there_after_one(tmp_path):
    folder, cache_dir = parquet(tmp_path / "d", train=rows(20), test=rows(6, start=100)), str(tmp_path / "cache")
    assert len(load_eval_split(folder, cache_dir=cache_dir).split) == 6
    splits = load_splits(folder, cache_dir=cache_dir, validation_size=0)
    assert (len(splits.train), len(splits.test)) == (20, 6)


def test_a_rewritten_folder_is_not_stale(tmp_path):
    for start in (0, 100):
        folder = parquet(tmp_path / "d", train=rows(20), test=rows(6, start=start))
        assert identities(load_eval_split(folder, cache_dir=str(tmp_path / "cache")).split)[0] == start


def test_without_a_train_split(tmp_path):
    """For a run that is an error, for an evaluation it need not be one."""

    def load(name, features=None, **options):
        data = {"first-00000-of-00001": rows(6), "second-00000-of-00001": rows(8, start=50)}
        if features:
            data = {key: value | {"y": [str(y) for y in value["y"]]} for key, value in data.items()}
        (tmp_path / name).mkdir(exist_ok=True)
        parquet(tmp_path / name / "data", features, **data)
        return load_eval_split(str(tmp_path / name), cache_dir=str(tmp_path / "c"), **options)

    assert identities(load("a", eval_split="second").split) == list(range(50, 58))
    with pytest.raises(DataError, match="--eval-split: first, second"):
        load("a")
    with pytest.raises(DataError, match="no train split to take them from"):
        load("b", STRINGS, eval_split="second")
    only = parquet(tmp_path / "only", test=rows(30))
    named = load_eval_split(only, eval_split="test", cache_dir=str(tmp_path / "c"))
    assert len(named.split) == 30
    assert not any("no test" in note for note in named.notes)
    assert len(load_eval_split(only, cache_dir=str(tmp_path / "c")).split) == 3  # as in a run


def test_errors(tmp_path):
    def fails(match, folder, **options):
        with pytest.raises(DataError, match=match):
            load_eval_split(folder, cache_dir=str(tmp_path / "c"), **options)

    folder = parquet(tmp_path / "d", train=rows(20), test=rows(4))
    fails(r"no split 'tset'; --eval-split can be .*Did you mean 'test'", folder, eval_split="tset")
    fails("--limit-eval 0", folder, limit_eval=0)
    fails("no column 'z'", folder, label_column="z")
    fails("'test' is empty", parquet(tmp_path / "e", train=rows(20), test=rows(0)), eval_split="test")
    fails("2 labels are not one of the 2 classes", parquet(
        tmp_path / "l", train=rows(20), test=rows(4) | {"y": [0, 1, -1, None]}), eval_split="test")  # fmt: skip
    fails("Name one with --eval-split", parquet(tmp_path / "few", train=rows(4)))
    (tmp_path / "d" / "test.parquet").write_bytes(b"damaged")
    fails("cannot be read", folder)
    fails("Did you mean 'cifar10'", "cifr10")


def test_rows_say_where_an_image_was(tmp_path):
    """Whatever was chosen and held out: pixel value i is row i of the train file, 100 + i of the test file."""
    folder = parquet(tmp_path / "d", train=rows(60), test=rows(12, start=100))
    splits = load_splits(folder, validation_size=9, limit_train=17, limit_eval=4, cache_dir=str(tmp_path / "c"))
    for split, start in ((splits.train, 0), (splits.validation, 0), (splits.test, 100)):
        found = split.row_array()
        assert found.dtype == np.int64
        assert identities(split) == [start + row for row in found.tolist()]
        assert found.tolist() != list(range(len(found)))
    whole = load_splits(folder, cache_dir=str(tmp_path / "c")).test
    assert whole.rows is None
    assert whole.row_array().tolist() == list(range(12))
    twice = splits.train.select(np.array([5, 2]), "two")
    assert twice.row_array().tolist() == splits.train.row_array()[[5, 2]].tolist()
    assert identities(twice) == twice.row_array().tolist()
    tenth = load_eval_split(parquet(tmp_path / "t", train=rows(60)), limit_eval=3, cache_dir=str(tmp_path / "c")).split
    assert identities(tenth) == tenth.row_array().tolist()
    stream = load_splits(folder, streaming=True, validation_size=0, cache_dir=str(tmp_path / "c")).test
    for call in (stream.row_array, lambda: stream.select(np.array([0]), "none")):
        with pytest.raises(TypeError, match="stream"):
            call()


def test_the_features_survive(tmp_path):
    """The label column is read back as what it was, not as plain numbers."""
    folder = parquet(tmp_path / "d", train=rows(20), test=rows(6))
    split = load_eval_split(folder, cache_dir=str(tmp_path / "c")).split
    assert isinstance(split.dataset.features["y"], ClassLabel)
    assert read_column(split.dataset, "y").to_pylist() == [0, 1] * 3


def test_a_split_that_cannot_be_loaded_is_no_reason_to_load_the_others(monkeypatch):
    """They may be a hundred times as large."""
    asked = []

    def fail(name):
        asked.append(name)
        raise DataError(f"{name} is damaged")

    def open_source(dataset_id, *, on_demand=False, cache_dir=None):
        return Source(SplitsOnDemand(("train", "validation", "test"), fail), on_demand=on_demand)

    monkeypatch.setattr(splits, "open_source", open_source)
    with pytest.raises(DataError, match="test is damaged"):
        load_eval_split("org/data")
    assert asked == ["test"]
