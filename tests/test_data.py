"""From ids and folders to splits, from splits to batches; every error a user can cause is one clear message."""

import io
import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image, features

from arrest_hub.corrupt import CorruptImages, read_image
from arrest_hub.data import (
    EpochSampler,
    ImageDataset,
    StreamingImages,
    eval_loader,
    load_splits,
    to_pixels,
    train_loader,
)
from arrest_hub.data_speed import loader_images_per_second
from arrest_hub.errors import DataError, HubError
from arrest_hub.images import ImageError, decode_image
from arrest_hub.splits import load_eval_split
from arrest_hub.subsets import balanced_subset
from arrest_hub.transforms import Preprocessing, eval_transform, train_transform

PREPROCESSING = Preprocessing((8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
EVAL = eval_transform(PREPROCESSING)
TRAIN = train_transform(PREPROCESSING)


def encoded(value: int, size: int = 8, mode: str = "L") -> bytes:
    """A PNG whose pixels all have one value, so that an image tells which one it is."""
    buffer = io.BytesIO()
    Image.new(mode, (size, size), value if mode == "L" else (value,) * len(mode)).save(buffer, "PNG")
    return buffer.getvalue()


def rows(n: int, classes: int = 2, start: int = 0) -> dict:
    return {
        "img": [{"bytes": encoded(start + i), "path": None} for i in range(n)],
        "y": [i % classes for i in range(n)],
    }


def labelled(names=("cat", "dog")) -> Features:
    return Features({"img": ImageFeature(), "y": ClassLabel(names=list(names))})


def parquet(folder: Path, features: Features | None = None, **splits: dict) -> str:
    folder.mkdir(exist_ok=True)
    for name, columns in splits.items():
        Dataset.from_dict(columns, features=features or labelled()).to_parquet(folder / f"{name}.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def digits():
    return load_splits("digits")


def identities(split) -> list[int]:
    """The pixel value of each image: which images a split holds."""
    return [int(item["pixels"][0, 0, 0]) for item in ImageDataset(split, EVAL)]


# --- splits ---------------------------------------------------------------------------------------------


def test_digits(digits):
    assert digits.class_names == [str(i) for i in range(10)]
    assert (len(digits.train), len(digits.validation), len(digits.test)) == (1437 - 144, 144, 360)
    assert np.bincount(digits.test.labels()).tolist() == [36] * 10
    assert np.ptp(np.bincount(digits.validation.labels())) <= 1
    assert any("144 images held out of 'train'" in note and "seed 0" in note for note in digits.notes)
    item = ImageDataset(digits.train, EVAL)[5]
    assert item["pixels"].shape == (3, 8, 8)
    assert item["pixels"].dtype == torch.uint8
    assert item["pixels"].max() == 255


def test_digits_files_are_what_the_script_writes(tmp_path):
    pytest.importorskip("sklearn")
    import pyarrow.parquet as pq

    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, root / "scripts" / "make_digits.py", tmp_path], check=True, capture_output=True)
    for name in ("train.parquet", "test.parquet"):
        assert pq.read_table(tmp_path / name).equals(pq.read_table(root / "arrest_hub" / "digits" / name))


def test_hold_out_is_seeded_and_disjoint(cache, tmp_path):
    folder = parquet(tmp_path / "d", train=rows(40), test=rows(4, start=100))
    a, b = load_splits(folder, seed=1, validation_size=10), load_splits(folder, seed=1, validation_size=0.25)
    other = load_splits(folder, seed=2, validation_size=10)
    assert identities(a.validation) == identities(b.validation) != identities(other.validation)
    assert sorted(identities(a.train) + identities(a.validation)) == list(range(40))
    assert a.validation.labels().count(0) == 5
    assert load_splits(folder, validation_size=0).validation is None
    assert len(load_splits(folder).validation) == 4  # a tenth


def test_test_split_rules(cache, tmp_path):
    three = parquet(tmp_path / "three", train=rows(20), validation=rows(6, start=50), test=rows(4, start=100))
    splits = load_splits(three)
    assert (identities(splits.validation)[0], identities(splits.test)[0], len(splits.train)) == (50, 100, 20)
    typed = load_splits(three, validation_size=5)
    assert identities(typed.validation) == identities(splits.validation)
    assert any("--validation-size 5 is ignored" in note for note in typed.notes)
    flagged = load_splits(three, eval_split="validation")
    assert identities(flagged.test)[0] == 50
    assert identities(flagged.validation)[0] < 20  # never the split that is reported

    hidden = rows(4, start=100) | {"y": [-1] * 4}
    unlabelled = load_splits(parquet(tmp_path / "u", train=rows(20), validation=rows(6, start=50), test=hidden))
    assert identities(unlabelled.test)[0] == 50
    assert any("'test' is not used" in note for note in unlabelled.notes)

    train, own = rows(40), rows(6, start=50)
    for kind, parts, first in (("own", {"validation": own}, [50]), ("none", {}, range(40))):
        folder = parquet(tmp_path / f"empty-{kind}", train=train, test=rows(0), **parts)
        splits = load_splits(folder, validation_size=4)
        assert identities(splits.test)[0] in first
        assert sum("'test' is not used: it is empty" in note for note in splits.notes) == 1
        data = {name: Dataset.from_dict(part, features=labelled()) for name, part in parts.items()}
        data["train"] = Dataset.from_dict(train, features=labelled())
        data["test"] = data["train"].select(range(4)).remove_columns("y")
        DatasetDict(data).save_to_disk(tmp_path / f"without-{kind}")
        splits = load_splits(str(tmp_path / f"without-{kind}"), validation_size=4)
        assert identities(splits.test)[0] in first
        assert sum("'test' is not used: it has no column 'y'" in note for note in splits.notes) == 1
        with pytest.raises(DataError, match="'test' has no column 'y'"):
            load_splits(str(tmp_path / f"without-{kind}"), eval_split="test")
    splits = load_splits(parquet(tmp_path / "two", train=train, validation=rows(0), test=own), validation_size=4)
    assert (len(splits.validation), splits.test.name) == (4, "test")
    assert any("'validation' is not used: it is empty" in note for note in splits.notes)

    alone = load_splits(parquet(tmp_path / "alone", train=rows(40)))
    assert (len(alone.test), len(alone.validation), len(alone.train)) == (4, 4, 32)
    assert sorted(identities(alone.test) + identities(alone.validation) + identities(alone.train)) == list(range(40))


def test_limits(cache, tmp_path):
    folder = parquet(tmp_path / "d", train=rows(40), test=rows(10, start=100))
    splits = load_splits(folder, limit_train=7, limit_eval=3)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (7, 3, 3)
    assert sorted(np.bincount(splits.train.labels())) == [3, 4]
    assert len(load_splits(folder, limit_train=1000).train) == 36


def test_balanced_subset():
    labels = np.array([0] * 50 + [1] * 30 + [2] * 3)
    chosen = balanced_subset(labels, 20, seed=0)
    assert np.bincount(labels[chosen]).tolist() in ([8, 9, 3], [9, 8, 3])
    assert np.bincount(labels[balanced_subset(labels, 20, 0, keep_half=True)])[2] == 1
    assert len(balanced_subset(labels, 83, 0)) == 83
    with pytest.raises(DataError, match="at most 41"):
        balanced_subset(labels, 60, 0, keep_half=True)


def test_a_rewritten_folder_is_not_stale(cache, tmp_path):
    folder = parquet(tmp_path / "d", train=rows(20), test=rows(2))
    stamp = os.stat(tmp_path / "d" / "train.parquet").st_mtime_ns
    assert min(identities(load_splits(folder, validation_size=0).train)) == 0
    parquet(tmp_path / "d", train=rows(20, start=100), test=rows(2))
    os.utime(tmp_path / "d" / "train.parquet", ns=(stamp, stamp))  # as rsync and cp -p do
    assert min(identities(load_splits(folder, validation_size=0).train)) == 100


@pytest.mark.parametrize("with_splits", [True, False])
def test_image_folder(tmp_path, with_splits):
    for part in ("train", "val") if with_splits else (".",):
        for number, name in enumerate(("cat", "dog")):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(10):
                (folder / f"{i}.png").write_bytes(encoded(100 * number + i, mode="RGB"))
            (folder / "notes.txt").write_text("no image")
    splits = load_splits(str(tmp_path))
    assert splits.class_names == ["cat", "dog"]
    assert len(splits.test) == (20 if with_splits else 2)
    for item in ImageDataset(splits.train, EVAL):
        assert (item["pixels"][0, 0, 0] >= 100) == bool(item["label"])
    assert not any("empty" in note for note in splits.notes)
    (folder.parent / "bird").mkdir()
    again = load_splits(str(tmp_path))
    assert again.class_names == ["cat", "dog"]
    assert any("empty" in note and "bird" in note for note in again.notes), "a class without images is not passed over"


def write_folder(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(10):
            (root / name / f"{i}.png").write_bytes(encoded(100 * (number % 2) + i, mode="RGB"))
    return root


def test_what_runs_write_into_an_image_folder_is_no_class(tmp_path):
    write_folder(tmp_path, "cat", "dog", "runs/mine/export/figures", "evals/mine/figures", "runs/going/checkpoints/x")
    for name in ("runs/mine/export/training_record.json", "evals/mine/eval_config.yaml", "evals/mine/verdicts.parquet",
                 "runs/going/config.yaml"):  # fmt: skip
        (tmp_path / name).touch()
    assert load_splits(str(tmp_path)).class_names == ["cat", "dog"]


def test_what_an_image_folder_has_that_is_not_read_is_said(tmp_path):
    root = write_folder(tmp_path, "train/cat", "train/dog", "test/cat", "val2/cat")
    (root / "loose.png").write_bytes(encoded(1, mode="RGB"))
    (root / "train" / "more.png").write_bytes(encoded(1, mode="RGB"))
    notes = load_splits(str(root)).notes
    assert "folders of images beside the splits, which are not read: val2" in notes
    assert "images in no class subfolder, which are not read: 2, such as loose.png" in notes
    assert "test/ has no image of dog" in notes
    whole = load_splits(str(write_folder(tmp_path / "whole", "cat", "dog"))).notes
    assert not [note for note in whole if "not read" in note or "no image" in note]


def test_a_link_that_leads_back_is_followed_once(tmp_path):
    root = write_folder(tmp_path / "images", "cat", "dog")
    (root / "cat" / "self").symlink_to(".")
    (root / "cat" / "up").symlink_to("..")
    (root / "dog" / "more").symlink_to(write_folder(tmp_path, "elsewhere") / "elsewhere")
    splits = load_splits(str(root))
    parts = (splits.train, splits.validation, splits.test)
    assert sum(len(part) for part in parts if part is not None) == 30, "a linked folder is read, and none twice"


def test_one_class_folder_says_what_may_be_meant(tmp_path):
    with pytest.raises(DataError, match=rf"one class only, flowers/.*cat, dog.*give '{tmp_path}/in/flowers'"):
        load_splits(str(write_folder(tmp_path / "in", "flowers/cat", "flowers/dog")))
    with pytest.raises(DataError, match=r"one class only, cat/; at least two are needed\.$"):
        load_splits(str(write_folder(tmp_path / "split", "train/cat", "test/cat")))
    with pytest.raises(DataError, match=rf"one class only, all/.*cat, dog.*give '{tmp_path}/deep/train/all'"):
        load_splits(str(write_folder(tmp_path / "deep", "train/all/cat", "train/all/dog")))
    root = write_folder(tmp_path / "table", "images")
    (root / "train.csv").write_text("id,label\n")
    with pytest.raises(DataError, match=r"one class only, images/; at least two.*train\.csv: .*metadata\.csv"):
        load_splits(str(root))


@pytest.mark.parametrize("load", [load_splits, load_eval_split])
def test_metadata_that_no_split_reads_is_an_error(load, cache, tmp_path):
    """`datasets` would take train and test for the classes."""
    root = write_folder(tmp_path / "data", "train", "test")
    lines = [f"{part}/{i}.png,{'cat' if i % 2 else 'dog'}" for part in ("train", "test") for i in range(10)]
    (root / "metadata.csv").write_text("\n".join(["file_name,label", *lines]) + "\n")
    with pytest.raises(DataError, match=r"metadata\.csv is not read for the split 't.*into the folder of each split"):
        load(str(root))
    (root / "metadata.csv").unlink()
    for part in ("train", "test"):
        some = [line.removeprefix(f"{part}/") for line in lines if line.startswith(part)]
        (root / part / "metadata.csv").write_text("\n".join(["file_name,label", *some]) + "\n")
    assert load(str(root)).class_names == ["cat", "dog"]


def test_saved_to_disk(tmp_path):
    data = {name: Dataset.from_dict(rows(20), features=labelled()) for name in ("train", "test")}
    DatasetDict(data).save_to_disk(tmp_path / "both")
    assert len(load_splits(str(tmp_path / "both")).test) == 20
    data["train"].save_to_disk(tmp_path / "one")
    assert len(load_splits(str(tmp_path / "one")).test) == 2
    DatasetDict(data | {"test": data["test"].select([])}).save_to_disk(tmp_path / "empty")
    with pytest.raises(DataError, match="or one of its splits is empty"):
        load_splits(str(tmp_path / "empty"))


def test_label_kinds(cache, tmp_path):
    def load(name, values, dtype):
        data = rows(len(values)) | {"y": values}
        features = Features({"img": ImageFeature(), "y": Value(dtype)})
        return load_splits(parquet(tmp_path / name, features, train=data), label_column="y", validation_size=0)

    strings = load("strings", ["dog", "cat"] * 10, "string")
    assert strings.class_names == ["cat", "dog"]
    assert set(zip(identities(strings.train), strings.train.labels(), strict=True)) <= {
        (i, 1 - i % 2) for i in range(20)
    }
    booleans = load("booleans", [True, False] * 10, "bool")
    assert (booleans.class_names, booleans.num_classes) == (["False", "True"], 2)
    assert set(zip(identities(booleans.train), booleans.train.labels(), strict=True)) <= {
        (i, 1 - i % 2) for i in range(20)
    }
    integers = load("integers", [0, 1, 2] * 8, "int32")
    assert (integers.class_names, integers.num_classes) == (None, 3)
    with pytest.raises(DataError, match="1 is missing, 2 is there"):
        load("gap", [0, 2] * 10, "int64")
    with pytest.raises(DataError, match="one class only"):
        load("one", [0] * 10, "int64")


def test_splits_are_no_classes(cache, tmp_path):
    """What `datasets` makes of a repository whose metadata it does not read."""
    names = parquet(tmp_path / "names", labelled(("test", "train")), train=rows(20))
    with pytest.raises(DataError, match="the classes would be test, train, which are its splits"):
        load_splits(names)


@pytest.mark.parametrize("kind", ["struct", "binary"])
def test_images_without_the_image_feature(cache, tmp_path, kind):
    struct = {"bytes": Value("binary"), "path": Value("string")}
    column = rows(20)["img"] if kind == "struct" else [encoded(i) for i in range(20)]
    features = Features(
        {"image": struct if kind == "struct" else Value("binary"), "label": ClassLabel(names=["a", "b"])}
    )
    data = {"image": column, "label": [0, 1] * 10}
    splits = load_splits(parquet(tmp_path / "d", features, train=data), validation_size=0)
    assert splits.train.image_column == "image"
    assert set(identities(splits.train)) <= set(range(20))


def test_label_map(digits):
    split = digits.test
    before = split.labels()
    split.label_map = list(range(9, -1, -1))
    try:
        assert split.labels() == [9 - label for label in before]
        assert ImageDataset(split, EVAL)[3]["label"] == 9 - before[3]
    finally:
        split.label_map = None


# --- errors ---------------------------------------------------------------------------------------------


def test_id_errors(tmp_path):
    with pytest.raises(DataError, match="Did you mean 'cifar10'"):
        load_splits("cifr10")
    with pytest.raises(DataError, match="does not exist"):
        load_splits("./no/such/folder")
    with pytest.raises(DataError, match="holds no images"):
        load_splits(str(tmp_path))
    (tmp_path / "x.parquet").write_bytes(b"damaged")
    with pytest.raises(DataError, match="is a file; give the folder"):
        load_splits(str(tmp_path / "x.parquet"))
    with pytest.raises(DataError, match="cannot be read"):
        load_splits(str(tmp_path), cache_dir=str(tmp_path / "cache"))
    for hub_id in ("nobody/nothing:config@main", "cifar10@main"):
        with pytest.raises(HubError, match="cannot be reached"):
            load_splits(hub_id)


@pytest.mark.parametrize("name", ["data[12]", "my?set", "x*"])
def test_a_folder_whose_name_is_a_pattern_reads_no_other(cache, tmp_path, name):
    for other in ("data1", "my_set", "xy"):
        parquet(tmp_path / other, train=rows(20), test=rows(4))
    folder = parquet(tmp_path / name, train=rows(20, start=50), test=rows(4, start=90))
    with pytest.raises(DataError, match=r"would read other folders\. Rename or move") as error:
        load_splits(folder, validation_size=0)
    assert str(tmp_path / name) in str(error.value)


def test_split_and_size_errors(cache, tmp_path):
    folder = parquet(tmp_path / "d", train=rows(20), test=rows(4))
    with pytest.raises(DataError, match=r"no split 'tset'; --eval-split can be train, test.*Did you mean 'test'"):
        load_splits(folder, eval_split="tset")
    with pytest.raises(DataError, match="no split 'x'; --train-split"):
        load_splits(folder, train_split="x")
    with pytest.raises(DataError, match="at most 10"):
        load_splits(folder, validation_size=15)
    with pytest.raises(DataError, match=r"--validation-size 2\.5"):
        load_splits(folder, validation_size=2.5)
    with pytest.raises(DataError, match="--limit-train 0"):
        load_splits(folder, limit_train=0)
    empty = parquet(tmp_path / "e", train=rows(20), test=rows(0))
    with pytest.raises(DataError, match="'test' is empty"):
        load_splits(empty, eval_split="test")


def test_column_errors(cache, tmp_path):
    image, label = ImageFeature(), ClassLabel(names=["a", "b"])

    def load(name, features, **options):
        data = {c: rows(20)["img"] if f == image else [i % 2 for i in range(20)] for c, f in features.items()}
        return load_splits(parquet(tmp_path / name, Features(features), train=data), validation_size=0, **options)

    with pytest.raises(DataError, match=r"several image columns: left, right\. Choose one with --image-column"):
        load("images", {"left": image, "right": image, "label": label})
    with pytest.raises(DataError, match=r"several label columns: colour, shape\. Choose one with --label-column"):
        load("labels", {"image": image, "colour": label, "shape": label})
    with pytest.raises(DataError, match=r"no label column.*label \(Value\('float64'\)\)\. Taken are whole numbers"):
        load("floats", {"image": image, "label": Value("float64")})
    with pytest.raises(DataError, match=r"no image column.*it has label"):
        load("noimage", {"label": label})
    with pytest.raises(DataError, match=r"no label column.*it has image .*, thing \(Value\('int64'\)\)"):
        load("nolabel", {"image": image, "thing": Value("int64")})
    with pytest.raises(DataError, match=r"no column 'lable'.*Did you mean 'label'"):
        load("typo", {"image": image, "label": label}, label_column="lable")
    with pytest.raises(DataError, match=r"'label' .--image-column. holds no images"):
        load("swapped", {"image": image, "label": label}, image_column="label")
    with pytest.raises(DataError, match=r"several label columns: camera, label\. Choose one with --label-column"):
        load("camera", {"image": image, "label": Value("int64"), "camera": label})
    for name, usual, other in (("int", Value("int64"), label), ("class", label, Value("int64"))):
        assert load(name, {"image": image, "category": other, "label": usual}).train.label_column == "label"
    assert load("fine", {"image": image, "fine_label": label, "coarse_label": label}).train.label_column == "fine_label"


def test_label_out_of_range(cache, tmp_path):
    data = rows(20) | {"y": [0, 1] * 9 + [0, None]}
    with pytest.raises(DataError, match=r"split 'train': 1 labels .* None \(image 19\)"):
        load_splits(parquet(tmp_path / "d", train=data, test=rows(4)))


def test_an_image_that_was_held_out_is_named_by_its_row(cache, tmp_path):
    data = rows(40)
    for row in range(40):
        data["img"][row]["path"] = None
    data["img"][7]["bytes"] = b"x"
    folder = parquet(tmp_path / "d", train=data)
    found = 0
    for seed in range(20):
        splits = load_splits(folder, validation_size=0, seed=seed)
        if 7 in splits.test.row_array():
            found += 1
            with pytest.raises(ImageError, match=r"image \d+ \(row 7 of the split that it was drawn from\): it cannot"):
                list(eval_loader(splits.test, EVAL, batch_size=4, num_workers=0))
    assert found


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_image_is_one_clear_line(cache, tmp_path, workers):
    data = rows(8)
    data["img"][5]["bytes"] = data["img"][5]["bytes"][:40]
    splits = load_splits(parquet(tmp_path / "d", train=rows(20), test=data))
    with pytest.raises(ImageError) as error:
        list(eval_loader(splits.test, EVAL, batch_size=4, num_workers=workers))
    assert str(error.value).startswith("split 'test', image 5: it cannot be decoded")
    assert "\n" not in str(error.value)
    assert isinstance(error.value, DataError)


# --- decoding -------------------------------------------------------------------------------------------


def save(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("mode", "colour", "kind", "expected"),
    [
        ("L", 100, "PNG", (100, 100, 100)),
        ("1", 1, "PNG", (255, 255, 255)),
        ("LA", (100, 7), "PNG", (100, 100, 100)),
        ("RGBA", (10, 20, 30, 128), "PNG", (10, 20, 30)),
        ("CMYK", (0, 255, 255, 0), "TIFF", (255, 0, 0)),
        ("I;16", 51400, "PNG", (200, 200, 200)),
        ("I", 65535, "TIFF", (255, 255, 255)),
    ],
)
def test_modes_become_rgb(mode, colour, kind, expected):
    image = decode_image(save(Image.new(mode, (3, 2), colour), kind))
    assert (image.mode, image.size) == ("RGB", (3, 2))
    assert image.getpixel((0, 0)) == expected


def test_palette_with_transparency_and_paths(tmp_path):
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 9, 8, 7])
    (tmp_path / "p.png").write_bytes(save(image, transparency=0))
    decoded = decode_image({"bytes": None, "path": str(tmp_path / "p.png")})
    assert decoded.getpixel((1, 1)) == (9, 8, 7)


def test_exif_orientation():
    image = Image.new("RGB", (4, 2))
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to see it upright
    upright = decode_image(save(image, exif=exif))
    assert upright.size == (2, 4)
    assert upright.getpixel((1, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (b"no image", "cannot be decoded"),
        (encoded(1)[:-30], "cannot be decoded"),
        ({"bytes": None, "path": "/no/such.png"}, "No such file"),
        ({"bytes": None, "path": None}, "missing"),
        (save(Image.new("F", (2, 2), 0.5), "TIFF"), "floating point"),
        (save(Image.new("I", (2, 2), 70000), "TIFF"), "outside 0..65535"),
    ],
)
def test_undecodable(value, words):
    with pytest.raises(ImageError, match=words):
        decode_image(value)


@pytest.mark.parametrize(("kind", "places"), [("AVIF", (81, 82, 83, 84)), ("DDS", (80, 81, 82, 83))])
def test_what_decoders_of_every_kind_say_is_understood(kind, places):
    """RuntimeError from the AVIF decoder, NotImplementedError from the DDS one."""
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    content = bytearray(save(Image.new("RGB", (16, 16), (9, 99, 200)), kind))
    for place in places:
        content[place] = 0
    assert read_image(bytes(content), "train", 0, CorruptImages(1)) is None
    with pytest.raises(ImageError, match="cannot be decoded"):
        decode_image(bytes(content))


# --- loaders --------------------------------------------------------------------------------------------


def test_to_pixels():
    assert to_pixels(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx([0, 0.2, 1])


def test_epoch_sampler():
    sampler = EpochSampler(50, seed=1)
    first = list(sampler)
    assert first == list(sampler)
    assert sorted(index for _, index in first) == list(range(50))
    sampler.set_epoch(1)
    second = list(sampler)
    assert {epoch for epoch, _ in second} == {1}
    assert [i for _, i in second] != [i for _, i in first]
    assert [i for _, i in EpochSampler(50, seed=2)] != [i for _, i in first]


def test_augmentation_depends_on_seed_epoch_index_alone(digits):
    data = ImageDataset(digits.train, TRAIN, seed=1)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    once = data[(2, 7)]["pixels"]
    assert torch.equal(torch.get_rng_state(), state)  # the caller's generator is untouched
    torch.manual_seed(99)
    assert torch.equal(data[(2, 7)]["pixels"], once)
    assert any(not torch.equal(data[(e, 7)]["pixels"], once) for e in (3, 4, 5))
    assert any(not torch.equal(ImageDataset(digits.train, TRAIN, seed=s)[(2, 7)]["pixels"], once) for s in (2, 3, 4))


def collect(loader) -> list[tuple[int, int, bytes]]:
    return [
        (int(i), int(label), pixels.numpy().tobytes())
        for batch in loader
        for i, label, pixels in zip(batch["index"], batch["label"], batch["pixels"], strict=True)
    ]


def test_train_loader_is_the_same_whatever_the_workers(digits):
    """Two epochs with persistent workers equal two epochs without any."""
    both = []
    for workers in (0, 2):
        loader = train_loader(digits.train, TRAIN, batch_size=100, seed=3, num_workers=workers)
        epochs = []
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)
            epochs.append(collect(loader))
        both.append(epochs)
    assert both[0] == both[1]
    first, second = both[0]
    assert len(first) == 1200  # 1293 less the incomplete batch
    assert len({index for index, _, _ in first}) == 1200
    pixels = {index: content for index, _, content in first}
    shared = [(pixels[index], content) for index, _, content in second if index in pixels]
    assert np.mean([a == b for a, b in shared]) < 0.5  # augmented anew in the second epoch


def test_eval_loader_keeps_order_and_the_rest(digits):
    batches = list(eval_loader(digits.test, EVAL, batch_size=100, num_workers=0))
    assert [len(batch["label"]) for batch in batches] == [100, 100, 100, 60]
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(360))
    assert torch.cat([batch["label"] for batch in batches]).tolist() == digits.test.labels()
    assert batches[0]["pixels"].dtype == torch.uint8


def test_batch_larger_than_split(digits):
    with pytest.raises(DataError, match="fewer than one batch of 5000"):
        train_loader(digits.train, TRAIN, batch_size=5000, seed=0, num_workers=0)


def test_accelerate_skips_to_exactly_the_rest(digits):
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(train_loader(digits.train, TRAIN, batch_size=100, seed=3, num_workers=0))
    loader.set_epoch(4)
    whole = collect(loader)
    loader.set_epoch(4)
    assert collect(accelerator.skip_first_batches(loader, 5)) == whole[500:]
    plain = train_loader(digits.train, TRAIN, batch_size=100, seed=3, num_workers=0)
    plain.sampler.set_epoch(4)
    assert collect(plain) == whole


def test_two_processes_see_what_one_sees(digits):
    def loader(batch_size, processes, process):
        made = train_loader(digits.train, TRAIN, batch_size=batch_size, seed=3, num_workers=0)
        made = prepare_data_loader(made, num_processes=processes, process_index=process)
        made.set_epoch(2)
        return collect(made)

    one = loader(100, 1, 0)
    two = loader(50, 2, 0) + loader(50, 2, 1)
    assert sorted(one) == sorted(two)


def test_datasets_travel_to_workers_that_are_not_forked(digits, shards):
    stream = load_splits(shards, streaming=True).train
    for dataset in (ImageDataset(digits.train, TRAIN, seed=1), StreamingImages(stream, TRAIN, seed=1)):
        first, second = (next(iter(d)) for d in (dataset, pickle.loads(pickle.dumps(dataset))))
        assert torch.equal(first["pixels"], second["pixels"])


def test_training_leaves_the_global_generator_alone(digits):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    collect(train_loader(digits.train, TRAIN, batch_size=600, seed=3, num_workers=0))
    assert torch.equal(torch.rand(3), expected)


# --- streaming ------------------------------------------------------------------------------------------


@pytest.fixture
def shards(cache, tmp_path):
    """Four files of 30 images; pixel value i is image i, label i % 2."""
    for shard in range(4):
        parquet(tmp_path / "s", **{f"train-{shard:05d}-of-00004": rows(30, start=30 * shard)})
    return parquet(tmp_path / "s", test=rows(10, start=200))


def values(items) -> list[int]:
    return [int(item["pixels"][0, 0, 0]) for item in items]


def test_stream_splits(shards):
    splits = load_splits(shards, streaming=True, validation_size=10)
    held = values(StreamingImages(splits.validation, EVAL, shuffle=False))
    assert held == list(range(10))
    assert values(StreamingImages(splits.train, EVAL, shuffle=False)) == list(range(10, 120))
    assert any("skip and take" in note for note in splits.notes)
    loader = eval_loader(splits.test, EVAL, batch_size=4, num_workers=2)
    batches = list(loader)
    assert torch.cat([b["pixels"][:, 0, 0, 0] for b in batches]).tolist() == list(range(200, 210))
    assert torch.cat([b["label"] for b in batches]).tolist() == [0, 1] * 5
    with pytest.raises(TypeError, match="stream"):
        len(splits.test)


@pytest.mark.parametrize("readers", [1, 2, 3, 4, 5, 8])
def test_stream_readers_have_equal_parts(shards, readers):
    """Also where the files (4, of 30 rows) do not divide evenly: no image twice in an epoch, but for a row of a file
    that cannot be halved, and none left out but the rest; and no reader opens more files than its part lies in."""
    split = load_splits(shards, streaming=True, validation_size=0).train
    whole = 120 // readers
    seen = []
    for process in range(readers):
        stream = StreamingImages(
            split, EVAL, seed=5, num_processes=readers, process_index=process, buffer_size=16, per_process=whole
        )
        stream.set_epoch(2)
        part = values(stream)
        assert len(part) == whole
        assert len({value // 30 for value in part}) <= -(-4 // readers) + 1
        seen += part
    assert len(seen) == readers * whole
    assert len(set(seen)) == len(seen) - (4 if readers == 8 else 0), "15 of 30 rows, dealt out in 8 parts of 3 or 4"


@pytest.mark.parametrize("readers", [1, 2, 3, 7])
@pytest.mark.parametrize(("held_out", "by_shard"), [(0, True), (10, True), (40, False)])
def test_stream_readers_share_without_overlap(shards, readers, held_out, by_shard):
    """By shard, or by example where the held-out images reach beyond the first; never a held-out image."""
    split = load_splits(shards, streaming=True, validation_size=held_out).train
    assert split.by_shard == by_shard
    orders = []
    for epoch in (0, 1):
        parts = []
        for process in range(readers):
            stream = StreamingImages(split, EVAL, seed=5, num_processes=readers, process_index=process, buffer_size=16)
            stream.set_epoch(epoch)
            parts.append(values(stream))
        assert sorted(value for part in parts for value in part) == list(range(held_out, 120))
        orders.append(parts)
    assert orders[0] != orders[1]


def test_stream_loader(shards):
    split = load_splits(shards, streaming=True, validation_size=0).train
    assert split.num_examples == 120
    loader = train_loader(split, EVAL, batch_size=20, seed=1, num_workers=2)
    assert len(loader) == 6
    epochs = []
    for epoch in (0, 1):
        loader.dataset.set_epoch(epoch)  # persistent workers must see it
        batches = list(loader)
        assert len(batches) == 6
        pixels = torch.cat([b["pixels"][:, 0, 0, 0] for b in batches]).tolist()
        assert sorted(pixels) == list(range(120))
        indices = torch.cat([b["index"] for b in batches])
        assert len(indices.unique()) == 120
        epochs.append(pixels)
    assert epochs[0] != epochs[1]


def test_stream_processes_take_equally_many_steps(shards):
    split = load_splits(shards, streaming=True, validation_size=0).train
    counts = [
        len(list(train_loader(split, EVAL, batch_size=8, seed=1, num_workers=0, num_processes=3, process_index=p)))
        for p in range(3)
    ]
    assert counts == [5, 5, 5]
    split.num_examples = None
    with pytest.raises(DataError, match="length of the stream"):
        train_loader(split, EVAL, batch_size=8, seed=1, num_workers=0, num_processes=3)


@pytest.mark.parametrize("sizes", [(6, 594), (200, 400)])
def test_images_held_out_of_a_stream_are_there(cache, tmp_path, sizes):
    """Its first file may be much smaller than the others."""
    first = 0
    for shard, size in enumerate(sizes):
        data = rows(size, start=0)
        data["y"] = [(first + i) % 2 for i in range(size)]
        parquet(tmp_path / "s", **{f"train-{shard:05d}-of-00002": data})
        first += size
    splits = load_splits(str(tmp_path / "s"), streaming=True, validation_size=40)
    assert splits.train.by_shard == (sizes[0] == 200)
    for split in (splits.test, splits.validation):
        assert len(values(StreamingImages(split, EVAL, shuffle=False))) == split.num_examples > 0
    left = len(values(StreamingImages(splits.train, EVAL, shuffle=False)))
    assert left == splits.train.num_examples == 600 - splits.test.num_examples - 40


def test_stream_limit(shards):
    splits = load_splits(shards, streaming=True, validation_size=0, limit_train=12, limit_eval=5)
    first, second = (StreamingImages(splits.train, EVAL, seed=s) for s in (0, 1))
    second.set_epoch(3)
    assert sorted(values(first)) == sorted(values(second))
    assert len(set(values(first))) == splits.train.num_examples == 12
    assert len(values(StreamingImages(splits.test, EVAL, shuffle=False))) == 5
    assert any("not balanced" in note for note in splits.notes)


def test_stream_label_out_of_range(cache, tmp_path):
    data = rows(20) | {"y": [0, 1] * 9 + [0, None]}
    split = load_splits(parquet(tmp_path / "d", train=data, test=rows(4)), streaming=True, validation_size=0).train
    with pytest.raises(DataError, match="image 19: label None"):
        list(StreamingImages(split, EVAL, shuffle=False))


def test_stream_needs_class_names(cache, tmp_path):
    features = Features({"image": ImageFeature(), "label": Value("int64")})
    data = {"image": rows(20)["img"], "label": [0, 1] * 10}
    with pytest.raises(DataError, match="Leave out --streaming"):
        load_splits(parquet(tmp_path / "d", features, train=data), streaming=True)


# --- resumption -----------------------------------------------------------------------------------------


class Counted:
    """A transform that counts how many images it is given."""

    def __init__(self, transform):
        self.transform, self.count = transform, 0

    def __call__(self, image):
        self.count += 1
        return self.transform(image)


@pytest.mark.parametrize(
    ("processes", "workers", "held_out"),  # where some are held out, every reader reads all shards
    [(1, 0, 0), (1, 3, 0), (2, 0, 0), (2, 2, 0), (2, 3, 0), (1, 2, 40), (2, 0, 40), (2, 3, 40)],
)
def test_a_stream_goes_on_where_it_stood(shards, processes, workers, held_out):
    """Index for index and pixel for pixel, without one image twice or left out, also in the epochs after."""
    split = load_splits(shards, streaming=True, validation_size=held_out).train
    size = (120 - held_out) // processes // 5 * 5  # 80 images: 16 batches, or 8, which three workers share unevenly

    def loader(process):
        return train_loader(
            split, TRAIN, batch_size=5, seed=7, num_workers=workers, num_processes=processes, process_index=process
        )

    seen = []
    for process in range(processes):
        whole = loader(process)
        whole.dataset.set_epoch(3)
        expected = collect(whole)
        assert len(expected) == size
        seen += [index for index, _, _ in expected]
        for done in (1, len(whole) - 1, len(whole)):
            again = loader(process)
            again.dataset.set_position(3, done)
            assert collect(again) == expected[5 * done :]
        whole.dataset.set_epoch(4)
        again.dataset.set_epoch(4)
        assert collect(again) == collect(whole)
    assert len(set(seen)) == len(seen) == size * processes


def test_nothing_is_decoded_twice(shards, digits):
    split = load_splits(shards, streaming=True, validation_size=0).train
    transform = Counted(TRAIN)
    loader = train_loader(split, transform, batch_size=10, seed=7, num_workers=0)
    loader.dataset.set_position(0, 11)
    assert len(collect(loader)) == 10
    assert transform.count == 10
    transform = Counted(TRAIN)
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(train_loader(digits.train, transform, batch_size=100, seed=3, num_workers=0))
    assert len(collect(accelerator.skip_first_batches(loader, 11))) == 100
    assert transform.count == 100


# --- corrupt images -------------------------------------------------------------------------------------


def damaged(folder, *, images=(3, 4, 11), count=20):
    data = rows(count)
    for index in images:
        data["img"][index]["bytes"] = data["img"][index]["bytes"][:40] + bytes([index])
    return parquet(folder, train=data, test=rows(4))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_images_are_skipped_and_listed_once(cache, tmp_path, streaming, workers):
    split = load_splits(damaged(tmp_path / "d"), streaming=streaming, validation_size=0).train
    orders = []
    for limit in (3, 9):
        corrupt = CorruptImages(limit)
        loader = train_loader(split, TRAIN, batch_size=2, seed=1, num_workers=workers, corrupt=corrupt)
        orders.append([])
        for epoch in (0, 1):
            (loader.dataset if streaming else loader.sampler).set_epoch(epoch)
            orders[-1].append(collect(loader))
        entries = corrupt.entries()
        assert len(entries) == 3, "once, and not once an epoch"
        assert all("cannot be decoded" in entry["error"] for entry in entries)
        if not streaming:
            assert sorted(entry["index"] for entry in entries) == [3, 4, 11]
            images = [index for index, _, _ in orders[-1][0]]
            assert not {3, 4, 11} & set(images)
            assert images.count(5) == 3, "in place of the two before it"
            assert len(images) == 20
        again = CorruptImages(limit, entries)
        assert again.entries() == entries
        assert all(again.skip(entry) for entry in entries)
    assert orders[0] == orders[1]
    few = train_loader(split, TRAIN, batch_size=2, seed=1, num_workers=0, corrupt=CorruptImages(2))
    with pytest.raises(ImageError, match="More than --skip-corrupt 2 images"):
        collect(few)


def test_a_stream_with_corrupt_images_goes_on_where_it_stood(cache, tmp_path):
    split = load_splits(damaged(tmp_path / "d"), streaming=True, validation_size=0).train

    def loader(known):
        return train_loader(split, TRAIN, batch_size=2, seed=1, num_workers=0, corrupt=CorruptImages(5, known))

    first = loader([])
    expected = collect(first)
    again = loader(first.dataset.corrupt.entries())
    again.dataset.set_position(0, 7)
    assert collect(again) == expected[14:]


def test_images_that_a_stream_lacks_count_as_one_in_every_epoch(cache, tmp_path):
    data = rows(24)
    data["img"][3] = data["img"][15] = None
    split = load_splits(parquet(tmp_path / "d", train=data, test=rows(4)), streaming=True, validation_size=0).train
    corrupt = CorruptImages(1)
    loader = train_loader(split, TRAIN, batch_size=2, seed=1, num_workers=0, corrupt=corrupt)
    orders = []
    for epoch in range(3):
        loader.dataset.set_position(epoch, 0)
        orders.append(collect(loader))
    assert [entry["error"] for entry in corrupt.entries()] == ["it is missing"]
    assert corrupt.knows(None)
    again = train_loader(split, TRAIN, batch_size=2, seed=1, num_workers=0, corrupt=CorruptImages(1, corrupt.entries()))
    again.dataset.set_position(2, 7)
    assert collect(again) == orders[2][14:]


def test_long_entries_are_cut_and_images_without_bytes_are_told_apart():
    corrupt = CorruptImages(3)
    for number in range(3):
        value = {"bytes": None, "path": f"/nowhere/{'x' * 900}{number}"}
        assert read_image(value, "train", number, corrupt) is None
    assert [entry["index"] for entry in corrupt.entries()] == [0, 1, 2]
    assert read_image({"bytes": None, "path": f"/nowhere/{'x' * 900}1"}, "train", 9, corrupt) is None
    with pytest.raises(ImageError, match="--skip-corrupt N"):
        read_image(None, "train", 0, CorruptImages(0))
    with pytest.raises(ImageError) as error:
        read_image(None, "test", 0)
    assert "--skip-corrupt" not in str(error.value)


# --- many readers ---------------------------------------------------------------------------------------


def test_sixteen_workers_read_one_folder(cache, tmp_path):
    split = load_splits(parquet(tmp_path / "d", train=rows(64), test=rows(2)), validation_size=0).train
    loader = train_loader(split, EVAL, batch_size=2, seed=0, num_workers=16)
    assert sorted(index for index, _, _ in collect(loader)) == list(range(64))


def open_in_child(source, folder, results):
    import datasets

    datasets.config.HF_DATASETS_CACHE = folder
    results.put(identities(load_splits(source, validation_size=0).train))


def test_eight_processes_open_a_new_dataset_at_once(tmp_path):
    """As on a node whose processes share a cache: whoever is first prepares it, the others wait for it."""
    source = parquet(tmp_path / "d", train=rows(40), test=rows(4))
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    children = [context.Process(target=open_in_child, args=(source, tmp_path / "c", results)) for _ in range(8)]
    for child in children:
        child.start()
    assert [results.get() for _ in children] == [list(range(40))] * 8
    for child in children:
        child.join()


def test_speed_of_the_data_alone(digits):
    loader = train_loader(digits.train, TRAIN, batch_size=100, seed=3, num_workers=0)
    assert loader_images_per_second(loader, seconds=0.1) > 50
    with pytest.raises(ValueError, match="two batches"):
        loader_images_per_second([{"label": torch.zeros(3)}], seconds=0.1)
