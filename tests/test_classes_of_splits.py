"""Splits that number, name or hide their classes otherwise than the one that is trained on; splits by other names."""

import os
import shutil

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from test_data import EVAL, encoded, identities, labelled, parquet, rows

from arrest_hub.data import ImageDataset, StreamingImages, load_splits
from arrest_hub.errors import DataError
from arrest_hub.splits import load_eval_split
from arrest_hub.transforms import Preprocessing, eval_transform

NAMES = ["bird", "cat", "dog"]


def typed(kind) -> Features:
    return Features({"img": ImageFeature(), "y": ClassLabel(names=kind) if isinstance(kind, list) else Value(kind)})


def saved(folder, **splits):
    """``name=(type of the label column, labels)``, written by `save_to_disk`."""
    parts = {
        name: Dataset.from_dict(rows(len(labels)) | {"y": labels}, features=typed(kind))
        for name, (kind, labels) in splits.items()
    }
    DatasetDict(parts).save_to_disk(folder)
    return str(folder)


TRAIN = (NAMES, [0, 1, 2] * 10)


@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        (["dog", "bird", "cat"], [0, 1, 2, 0]),  # in another order
        (["dog", "bird"], [0, 1, 0, 0]),  # some of them
        (["none", "dog", "bird", "cat"], [1, 2, 3, 1]),  # one more, which no image has
        ("string", ["dog", "bird", "cat", "dog"]),
    ],
)
def test_a_split_that_numbers_its_classes_otherwise_is_read_by_their_names(tmp_path, kind, labels):
    names = [label if kind == "string" else kind[label] for label in labels]
    folder = saved(tmp_path / "d", train=TRAIN, test=(kind, labels))
    for test in (load_splits(folder, validation_size=0).test, load_eval_split(folder).split):
        assert test.labels() == [NAMES.index(name) for name in names]
        assert [item["label"] for item in map(ImageDataset(test, EVAL).__getitem__, range(4))] == test.labels()
    if kind != "string" and "none" not in kind:
        stream = load_splits(folder, validation_size=0, streaming=True).test
        assert [item["label"] for item in StreamingImages(stream, EVAL, shuffle=False)] == test.labels()
        stream.label_map = [2, 1, 0]
        mapped = [item["label"] for item in StreamingImages(stream, EVAL, shuffle=False)]
        assert mapped == [2 - label for label in test.labels()]


@pytest.mark.parametrize(
    ("train", "test", "words"),
    [
        (
            TRAIN,
            (["bird", "cat", "cow"], [0, 2, 1]),
            "'test' has classes that 'train' lacks: 'cow'; 'train'",
        ),
        (TRAIN, ("float32", [0.0, 1.0, 2.0]), r"of split 'test' holds Value\(.*, and not classes as that of 'train'"),
        (("int64", [0, 1, 2] * 10), ("string", ["0", "1"]), "'test' holds strings, and not numbers as that of 'train'"),
        (("string", NAMES * 10), ("int64", [0, 1]), "'test' holds numbers, and not strings as that of 'train'"),
    ],
)
def test_a_split_of_other_classes_is_one_clear_error(tmp_path, train, test, words):
    folder = saved(tmp_path / "d", train=train, test=test)
    with pytest.raises(DataError, match=words):
        load_splits(folder, validation_size=0, eval_split="test")
    with pytest.raises(DataError, match=words):
        load_eval_split(folder, eval_split="test")


def test_parquet_files_are_read_by_their_own_classes(cache, tmp_path):
    """`datasets` reads the files of all splits by the names in the first."""
    folder = parquet(tmp_path / "d", labelled(["cat", "dog"]), train=rows(20))
    parquet(tmp_path / "d", labelled(["dog", "cat"]), test=rows(4))
    for streaming in (False, True):
        splits = load_splits(folder, validation_size=0, streaming=streaming)
        stream = [item["label"] for item in StreamingImages(splits.test, EVAL, shuffle=False)] if streaming else None
        names = [splits.class_names[label] for label in stream or splits.test.labels()]
        assert names == ["dog", "cat", "dog", "cat"]
    found = load_eval_split(folder)
    assert [found.class_names[label] for label in found.split.labels()] == ["dog", "cat", "dog", "cat"]
    (tmp_path / "d" / "train.parquet").rename(tmp_path / "d" / "train-0.parquet")
    parquet(tmp_path / "d", labelled(["dog", "cat"]), **{"train-1": rows(20)})
    with pytest.raises(DataError, match=r"'y' numbers its classes otherwise in .*train-1.parquet \(dog, cat\) than in"):
        load_splits(folder)


def test_a_column_that_is_not_used_may_differ(cache, tmp_path):
    for name, other in (("train", ["camera1", "x"]), ("test", ["camera2", "x"])):
        features = Features(dict(labelled()) | {"z": ClassLabel(names=other)})
        parquet(tmp_path / "d", features, **{name: rows(20) | {"z": [0] * 20}})
    assert load_splits(str(tmp_path / "d"), label_column="y").test.labels() == [0, 1] * 10


@pytest.mark.parametrize(
    ("kind", "labels"),
    [(["0", "1", "2"], [2, 0, 1]), ("int32", [2, 0, 1]), (["Bird", "CAT", "dog"], [2, 0, 1])],
)
def test_labels_that_mean_the_same(tmp_path, kind, labels):
    for number, splits in enumerate(
        ({"train": TRAIN, "test": (kind, labels)}, {"train": (kind, labels * 10), "test": TRAIN})
    ):
        assert (
            load_splits(saved(tmp_path / str(number), **splits), validation_size=0).test.labels() == splits["test"][1]
        )


def test_booleans_are_numbers(tmp_path):
    folder = saved(tmp_path / "d", train=("int64", [0, 1] * 10), test=("bool", [True, False]))
    assert load_splits(folder, validation_size=0).test.labels() == [1, 0]


@pytest.mark.parametrize("kind", [["cow", "goat"], ["bird", "cow"], "float32"])
def test_a_validation_split_of_other_classes_is_passed_over(tmp_path, kind):
    validation = (kind, [0, 1] if isinstance(kind, list) else [0.5, 1.5])
    splits = load_splits(saved(tmp_path / "d", train=TRAIN, validation=validation, test=(NAMES, [0, 1, 2])))
    assert splits.validation.name == "train[held-out validation]"
    assert any(note.startswith("split 'validation' is not used: ") for note in splits.notes)


def test_strings_that_hide_the_labels_are_no_test(tmp_path):
    folder = saved(tmp_path / "d", train=("string", NAMES * 20), test=("string", ["", ""]))
    splits = load_splits(folder, validation_size=0)
    assert splits.test.name == "train[held-out test]"
    assert any("'test' is not used: none of its labels, such as '', is a class of 'train'" in n for n in splits.notes)
    one = load_splits(saved(tmp_path / "one", train=TRAIN, test=(NAMES, [0] * 4)), validation_size=0)
    assert any("all labels of 'test' are one class" in note for note in one.notes)


def test_numbers_as_strings_are_in_the_order_of_numbers(tmp_path):
    folder = saved(tmp_path / "d", train=("string", [str(i) for i in range(12)] * 4))
    assert load_splits(folder, validation_size=0).class_names == [str(i) for i in range(12)]


@pytest.mark.parametrize("kind", ["torch", "numpy", "arrow", "pandas"])
@pytest.mark.parametrize("columns", [None, ["y"]])
def test_a_format_set_before_saving_changes_nothing(tmp_path, kind, columns):
    data = Dataset.from_dict(rows(40), features=labelled())
    data.with_format(kind, columns=columns).save_to_disk(tmp_path / "d")
    splits = load_splits(str(tmp_path / "d"), validation_size=0)
    assert set(zip(identities(splits.train), splits.train.labels(), strict=True)) <= {(i, i % 2) for i in range(40)}
    stream = load_splits(str(tmp_path / "d"), validation_size=0, streaming=True).train
    assert {item["label"] for item in StreamingImages(stream, EVAL, shuffle=False)} == {0, 1}


def test_a_sorted_stream_gives_no_held_out_images(cache, tmp_path):
    data = rows(600)
    data["y"] = [i // 300 for i in range(600)]
    folder = parquet(tmp_path / "sorted", train=data)
    with pytest.raises(DataError, match=r"sorted by class: its first 256 labels are all 0\. The 114 images to be held"):
        load_splits(folder, streaming=True)
    assert load_splits(folder).validation is not None
    parquet(tmp_path / "sorted", test=rows(4))
    assert load_splits(folder, streaming=True, validation_size=0).validation is None
    assert load_splits(parquet(tmp_path / "mixed", train=rows(600)), streaming=True).validation is not None


def test_too_few_images_of_each_class_for_a_test_split(tmp_path):
    folder = saved(tmp_path / "d", train=([str(i) for i in range(20)], list(range(20))))
    with pytest.raises(DataError, match=r"out of 20 of 20 classes.*at most 0 can. They were to be the test split"):
        load_splits(folder, validation_size=0)


# --- names of splits ------------------------------------------------------------------------------------


def images(folder, *names):
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(3):
            (folder / name / f"{i}.png").write_bytes(encoded(i))
    return str(folder)


@pytest.mark.parametrize("names", [("training_set", "test_set"), ("seg_train", "seg_test"), ("Train Data", "Val-Data")])
def test_splits_by_other_names_are_no_classes(tmp_path, names):
    images(tmp_path, *(f"{name}/{label}" for name in names for label in ("cat", "dog")))
    with pytest.raises(DataError, match=r"would be classes, and look like splits. Call them train/"):
        load_splits(str(tmp_path))


def test_classes_with_subfolders_of_their_own_are_classes(tmp_path):
    for number, names in enumerate(
        (
            ["cat", "dog", "train driver"],
            ["dev board", "train station"],
            ["freight_train", "passenger_train"],
            ["eval", "prod"],
        )
    ):
        images(tmp_path / str(number), *(f"{name}/{year}" for name in names for year in (2020, 2021)[number % 2 :]))
        if number == 1:
            images(tmp_path / "1", "bridge/2021")
            names = ["bridge", *names]
        assert load_eval_split(str(tmp_path / str(number)), eval_split="train").class_names == names


def test_a_split_without_any_class_of_train_is_not_used(tmp_path):
    images(tmp_path, "train/cat", "train/dog", "val/cat", "val/dog", "test/unknown")
    splits = load_splits(str(tmp_path))
    assert splits.test.name == "val"
    assert "test/ is not used: unknown in it is no class of train/" in splits.notes
    with pytest.raises(DataError, match=r"no split 'test'; .* test/ is not used: unknown in it is no class of train/"):
        load_splits(str(tmp_path), eval_split="test")
    images(tmp_path, "test/cat")
    with pytest.raises(DataError, match="test/ has classes that train/ lacks: unknown"):
        load_splits(str(tmp_path))


def test_what_splits_are_called(tmp_path):
    test = (NAMES, [0, 1, 2])
    assert load_splits(saved(tmp_path / "a", Train=TRAIN, Test=test), validation_size=0).test.name == "Test"
    assert load_splits(saved(tmp_path / "b", train=TRAIN, eval=test), validation_size=0).test.name == "eval"
    both = load_splits(saved(tmp_path / "e", Train=TRAIN, train=TRAIN, test=test), validation_size=0)
    assert both.train.name == "train"
    third = load_splits(saved(tmp_path / "c", train=TRAIN, holdout=test), validation_size=0)
    assert third.test.name == "train[held-out test]"
    assert "splits that are not used: holdout (--train-split and --eval-split choose others)" in third.notes
    with pytest.raises(
        DataError, match=r"and none called train to hold out a test set\. Name one with --eval-split: p, q"
    ):
        load_eval_split(saved(tmp_path / "d", p=TRAIN, q=TRAIN))


def test_another_file_among_the_images_changes_nothing(tmp_path):
    images(tmp_path, "train/cat/persian", "train/cat/siam", "train/dog/pug", "train/empty")
    shutil.rmtree(tmp_path / "train" / "empty")
    parquet(tmp_path, train=rows(2))
    (tmp_path / "train.parquet").rename(tmp_path / "meta_info.parquet")
    assert load_eval_split(str(tmp_path), eval_split="train").class_names == ["cat", "dog"]


def test_a_folder_of_a_known_name_is_not_read_without_a_word(tmp_path, monkeypatch):
    images(tmp_path, "digits/cat", "digits/dog")
    monkeypatch.chdir(tmp_path)
    splits = load_splits("digits")
    assert splits.num_classes == 10
    assert any("the folder digits is not read" in note and "./digits" in note for note in splits.notes)
    assert load_eval_split("./digits", eval_split="train").num_classes == 2


def test_a_name_that_is_no_text_is_one_clear_error(tmp_path):
    images(tmp_path, "train/cat", "train/dog")
    place = os.fsencode(tmp_path / "train" / "cat") + b"/\xff\xe9.png"
    try:
        with open(place, "wb") as file:
            file.write(encoded(1))
    except OSError:
        pytest.skip("this file system has names in UTF-8 alone")
    with pytest.raises(DataError, match=r"\\xff\\xe9\.png' is no UTF-8. Rename it"):
        load_splits(str(tmp_path))


def test_an_image_of_which_no_input_can_be_made_is_named(tmp_path):
    from io import BytesIO

    from PIL import Image

    buffer = BytesIO()
    Image.new("RGB", (4000, 1)).save(buffer, "PNG")
    data = rows(12)
    data["img"][5] = {"bytes": buffer.getvalue(), "path": None}
    DatasetDict({name: Dataset.from_dict(data, features=labelled()) for name in ("train", "test")}).save_to_disk(
        tmp_path / "d"
    )
    border = eval_transform(Preprocessing((8, 8), (0.5,) * 3, (0.5,) * 3, crop_mode="border"))
    splits = load_splits(str(tmp_path / "d"), validation_size=0)
    with pytest.raises(DataError, match="'test', image 5: of 4000 x 1 pixels no input of the network can be made"):
        ImageDataset(splits.test, border)[5]
