"""Image files in class folders become the raw `datasets` splits behind them; nothing is copied or cached."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image

from arrest_hub.errors import DataError
from arrest_hub.folder_checks import first_of

IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".jp2", ".avif"),
)

OURS = {"training_record.json", "eval_config.yaml"}
"""Files that an export or the record of an evaluation has, and no dataset."""

SPLIT_NAMES: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""What the parts of a dataset are called, the usual name first."""
KNOWN_SPLITS = {name for names in SPLIT_NAMES.values() for name in names}


def open_image_folder(path: Path, typed: str, *, shuffle: bool) -> tuple[dict[str, Dataset], list[str]]:
    """``path/<class>/**/*.jpg`` or ``path/<split>/<class>/**/*.jpg``, and sentences on what is left out.

    The classes are those of the train split, else of all splits. ``shuffle``: a split's rows are in an order drawn at
    random, always the same, instead of class after class.

    Raises DataError when there are no images in it, or the splits do not agree.
    """
    found: dict[str, dict[str, list[str]]] = {}
    without: list[str] = []
    folders = _split_folders(path, typed)
    for name, folder in folders.items():
        found[name] = {}
        for sub in _subfolders(folder):
            files = sorted(walk(sub))
            images = [file for file in files if _is_image(file)]
            if images:
                found[name][sub.name] = images
            elif files:
                without.append(f"{sub.relative_to(path)} (such as {os.path.basename(files[0])})")
    train = next((name for name in SPLIT_NAMES["train"] if name in found), None)
    class_names = sorted({label for name, classes in found.items() if train in (None, name) for label in classes})
    if not class_names:
        raise DataError(
            f"dataset folder {typed!r} holds no images in class subfolders (such as {path.name}/cat/1.jpg or "
            f"{path.name}/train/cat/1.jpg), no Parquet files and no saved dataset."
        )
    if len(class_names) == 1:
        where = next(folder for name, folder in folders.items() if class_names[0] in found[name])
        raise DataError(_one_class(path, typed, where / class_names[0]))
    splits: dict[str, Dataset] = {}
    useless = {name: classes for name, classes in found.items() if classes and not set(classes) & set(class_names)}
    for name, classes in found.items():
        unknown = sorted(set(classes) - set(class_names))
        if name in useless:
            continue
        if unknown:
            raise DataError(
                f"dataset folder {typed!r}: {name}/ has classes that {train}/ lacks: {', '.join(unknown[:5])}. "
                "Use the same class subfolders in both."
            )
        images = [image for label in class_names for image in classes.get(label, [])]
        labels = [i for i, label in enumerate(class_names) for _ in classes.get(label, [])]
        for text in (*images, *class_names):
            if not text.isprintable() and text != text.encode(errors="ignore").decode():
                raise DataError(
                    f"dataset folder {typed!r}: the name {os.fsencode(text)!r} is no UTF-8. Rename it (convmv does)."
                )
        features = Features({"image": Image(decode=False), "label": ClassLabel(names=class_names)})
        if shuffle:  # a stream is read in order, and a folder's order is class after class
            order = np.random.default_rng(0).permutation(len(images))
            images, labels = [images[i] for i in order], [labels[i] for i in order]
        splits[name] = Dataset.from_dict({"image": images, "label": labels}, features=features)
    empty = sorted(
        str(Path(folder).relative_to(path)) for folder, folders, inside in os.walk(path) if not folders + inside
    )
    notes = [f"empty folders, which are no class: {first_of(empty)}"] if empty else []
    for name, classes in useless.items():
        notes.append(f"{name}/ is not used: {first_of(sorted(classes))} in it is no class of {train}/")
        del found[name]
    if without:
        notes.append(
            f"folders without a file whose name ends as an image's does, which are no class: {first_of(without)}"
        )
    return splits, notes + _passed_over(path, folders, found, class_names)


def _passed_over(
    path: Path, folders: Mapping[str, Path], found: Mapping[str, Mapping[str, object]], class_names: Sequence[str]
) -> list[str]:
    """Sentences on images that are read for no split, and classes that a split lacks."""
    notes = []
    parts = list(folders.values())
    if path not in parts:
        beside = [part for part in _subfolders(path) if part not in parts and any(map(_is_image, walk(part)))]
        if beside:
            names = first_of([part.name for part in beside])
            notes.append(f"folders of images beside the splits, which are not read: {names}")
    loose = [
        file for folder in dict.fromkeys([path, *parts]) for file in sorted(folder.iterdir()) if _is_image(file.name)
    ]
    if loose:
        example = loose[0].relative_to(path)
        notes.append(f"images in no class subfolder, which are not read: {len(loose):,}, such as {example}")
    for name, classes in found.items():
        if missing := [label for label in class_names if label not in classes]:
            notes.append(f"{folders[name].name}/ has no image of {first_of(missing)}")
    return notes


def _one_class(path: Path, typed: str, only: Path) -> str:
    """What to say of a folder in which one subfolder alone holds images, or one of each split."""
    inside = [sub.name for sub in _subfolders(only) if any(_is_image(file) for file in walk(sub))]
    text = f"dataset folder {typed!r} has one class only, {only.name}/; at least two are needed."
    if inside:
        text += (
            f" If {first_of(inside)} in it are the classes (or splits), give "
            f"{os.path.join(typed, only.relative_to(path))!r}."
        )
    tables = sorted(file.name for file in path.glob("*.csv"))
    if tables:
        text += f" {first_of(tables)}: of tables only a metadata.csv beside the images is read (file_name,label)."
    return text


def _split_folders(path: Path, typed: str) -> dict[str, Path]:
    """The folder of each split; all of ``path`` is the train split where its subfolders are classes."""
    parts = _subfolders(path)
    splits = {part.name.lower(): part for part in parts if part.name.lower() in KNOWN_SPLITS and _subfolders(part)}
    if not any(name in SPLIT_NAMES["train"] for name in splits):  # a class may be called eval
        splits = {name: part for name, part in splits.items() if not name.startswith("eval")}
    if not splits:
        _check_unknown_splits(parts, typed)
    if not splits or any(name in SPLIT_NAMES["train"] for name in splits):
        return splits or {"train": path}
    others = [
        part.name for part in parts if part not in splits.values() and any(_is_image(file) for file in walk(part))
    ]
    if others:
        raise DataError(
            f"dataset folder {typed!r}: {first_of(list(splits))} would be a split and {first_of(others)} a class, as "
            "their names and subfolders are. Move the one or the other elsewhere, or put all classes into train/."
        )
    return splits


def _check_unknown_splits(parts: list[Path], typed: str) -> None:
    """Raises DataError where the subfolders, all of them, are splits by other names, such as training_set/ and
    test_set/, with subfolders alike."""
    inside = {part: {sub.name for sub in _subfolders(part)} for part in parts if _subfolders(part)}
    words = [set(re.findall("[a-z]+", part.name.lower())) & KNOWN_SPLITS for part in inside]
    trains = [bool(found & set(SPLIT_NAMES["train"])) for found in words]
    if len(words) > 1 and all(words) and any(trains) and not all(trains) and set.intersection(*inside.values()):
        raise DataError(
            f"dataset folder {typed!r}: {first_of([part.name for part in inside])} would be classes, and look like "
            "splits. Call them train/, validation/ and test/."
        )


def _subfolders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def walk(path: Path) -> Iterator[str]:
    """Every file under ``path`` that is not hidden, nor what a run or an evaluation of ours wrote there."""
    # a link may lead back to where the walk has been, or above
    seen = {str(parent) for parent in Path(os.path.realpath(path)).parents}
    for folder, subfolders, files in os.walk(path, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            subfolders.clear()
            continue
        seen.add(real)
        if OURS & set(files) or ("config.yaml" in files and "checkpoints" in subfolders):
            subfolders.clear()
            continue
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield from (os.path.join(folder, name) for name in files if not name.startswith("."))


def _is_image(file: str) -> bool:
    return os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES
