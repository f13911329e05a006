"""A dataset id becomes a train, a validation and a test split, and sentences that say how.

The test split is only ever used for the final numbers; the best weights are chosen on `validation`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from datasets import ClassLabel

from arrest_hub.columns import find_columns
from arrest_hub.errors import DataError, did_you_mean
from arrest_hub.image_folder import SPLIT_NAMES
from arrest_hub.labelled_source import LabelledSource, OtherClasses, check_labels, settle_columns
from arrest_hub.sources import RawSplit, Source, find_alias, open_source
from arrest_hub.subsets import ImageSplit, hold_out, limit


@dataclass
class Splits:
    """The three splits of a dataset, its classes, and where it came from.

    ``dataset_id`` is as typed; ``hub_id`` and ``revision`` (a commit) are set for a dataset on the Hub.
    ``notes`` are sentences to print at the start: which split serves for what, what was held out.
    """

    train: ImageSplit
    validation: ImageSplit | None
    test: ImageSplit
    class_names: list[str] | None
    num_classes: int
    dataset_id: str
    hub_id: str | None = None
    revision: str | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class EvalData:
    """The images a model is evaluated on (map-style), their classes, and where they came from; see `Splits`."""

    split: ImageSplit
    class_names: list[str] | None
    num_classes: int
    dataset_id: str
    hub_id: str | None = None
    revision: str | None = None
    notes: list[str] = field(default_factory=list)


def load_splits(
    dataset_id: str,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    train_split: str | None = None,
    eval_split: str | None = None,
    validation_size: float | int | None = None,
    limit_train: int | None = None,
    limit_eval: int | None = None,
    seed: int = 0,
    streaming: bool = False,
    cache_dir: str | None = None,
) -> Splits:
    """Open a dataset and settle what is trained on, what the best weights are chosen on, what is reported.

    ``dataset_id``: digits, cifar10, cifar100, imagenet, a folder, or ``org/name[:config][@revision]``.
    Test: ``eval_split``, else the labelled test split, else the validation split, else a tenth of train is
    held out. Validation: the dataset's own where it is not the test split; otherwise ``validation_size``
    images (a count, or a share below 1; None: a tenth, at most 1000; 0: no validation at all) are held out
    of train. ``limit_train`` and ``limit_eval`` (for validation and test) take that many images. What is
    held out or limited is drawn with ``seed``, classes as equal as possible (streams: see the notes).

    Raises DataError when no such splits can be made of the dataset, HubError when the Hub refuses.
    """
    _check_sizes(validation_size, limit_train, limit_eval)
    source = open_source(dataset_id, streaming=streaming, cache_dir=cache_dir)
    label_column, eval_split, notes = _with_alias(dataset_id, source, label_column, eval_split)
    train_name = _named_split(source.splits, train_split, "train", "--train-split", dataset_id)
    assert train_name is not None
    opened = settle_columns(source, dataset_id, train_name, image_column, label_column)
    train = opened.split(train_name)
    check_labels(train)
    test = _find_test(opened, eval_split, train_name, notes)
    validation = None
    own = _named_split(source.splits, None, "validation", "--eval-split", dataset_id, required=False)
    if validation_size != 0 and own is not None and own != train_name and (test is None or own != test.name):
        validation = _usable_split(opened, own, notes)
        if validation is not None and validation_size is not None:
            notes.append(f"--validation-size {validation_size:g} is ignored: the dataset has the split {own!r} for it")
    test_size = _test_size(opened, train) if test is None else 0
    if validation is not None or validation_size == 0:
        size = 0
    elif validation_size is None:
        size = _held_out_size(train, 0.1, 1000, already=test_size)
        if size == 0 and train.streaming:
            notes.append("no validation: the length of the stream is unknown; hold some out with --validation-size N")
    else:
        size = _held_out_size(train, validation_size, None, already=test_size)
    train, held_test, held_validation = hold_out(train, test_size, size, seed, notes)
    used = {train_name, own if validation is not None else None, None if test is None else test.name}
    left = [name for name in source.splits if name not in used and not any(repr(name) in note for note in notes)]
    if left:
        notes.append(f"splits that are not used: {', '.join(left)} (--train-split and --eval-split choose others)")
    test = test or held_test
    validation = validation or held_validation
    assert test is not None

    train = limit(train, limit_train, seed, notes, "--limit-train")
    test = limit(test, limit_eval, seed, notes, "--limit-eval")
    if validation is not None:
        validation = limit(validation, limit_eval, seed, notes, "--limit-eval")
    roles = [("train", train), ("validation", validation), ("test", test)]
    notes.insert(0, "; ".join(f"{role}: {_describe(part)}" for role, part in roles))
    classes = (opened.class_names, opened.num_classes)
    return Splits(train, validation, test, *classes, dataset_id, source.hub_id, source.revision, notes)


def load_eval_split(
    dataset_id: str,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    eval_split: str | None = None,
    limit_eval: int | None = None,
    seed: int = 0,
    held_out_seed: int | None = None,
    cache_dir: str | None = None,
) -> EvalData:
    """The test split that `load_splits` makes with the same options: same images, order, labels and classes.

    ``held_out_seed``: draws a test split that is held out of the training split; default: ``seed``, which draws
    ``limit_eval`` images.

    The other splits are neither downloaded nor converted where the dataset is in Parquet files with the classes
    in them (feature ClassLabel) and has a labelled test or validation split; a note says where they are. A
    dataset without a train split will do if ``eval_split`` or a usual name says which one is meant; of a dataset of
    one split a part is held out, whatever its name, unless ``eval_split`` gives it.

    Raises what `load_splits` raises.
    """
    _check_sizes(None, None, limit_eval)
    settle = partial(
        _eval_split,
        dataset_id=dataset_id,
        image_column=image_column,
        label_column=label_column,
        eval_split=eval_split,
        seed=seed if held_out_seed is None else held_out_seed,
    )
    data = settle(open_source(dataset_id, on_demand=True, cache_dir=cache_dir))
    if isinstance(data, str):
        why, data = data, settle(open_source(dataset_id, cache_dir=cache_dir))
        assert isinstance(data, EvalData)
        data.notes.append(f"every split of {dataset_id!r} was opened: {why}")
    data.split = limit(data.split, limit_eval, seed, data.notes, "--limit-eval")
    data.notes.insert(0, f"test: {_describe(data.split)}")
    return data


def _eval_split(
    source: Source,
    dataset_id: str,
    image_column: str | None,
    label_column: str | None,
    eval_split: str | None,
    seed: int,
) -> EvalData | str:
    """The whole test split of a source; of one opened on demand, possibly why all the splits are needed."""
    label_column, eval_split, notes = _with_alias(dataset_id, source, label_column, eval_split)
    train_name = _named_split(source.splits, None, "train", "", dataset_id, required=False)
    if train_name is None and eval_split is None and len(source.splits) == 1:
        train_name = next(iter(source.splits))
    held_out = f"the test images are held out of {train_name!r}"
    origin = train_name
    if origin is None or source.on_demand:  # then the columns and classes are those of the test split
        names = _test_names(source, eval_split, train_name, dataset_id)
        if not names and train_name is None:
            raise _no_test(source, dataset_id, train_name)
        if not names:
            return held_out
        problems = []
        for origin in names:  # the first may lack the labels
            raw = source.splits[origin]  # a split that cannot be loaded is an error, and no reason to load the others
            try:
                find_columns(raw, image_column, label_column, dataset_id)
                break
            except DataError as error:
                problems.append(error)
        else:
            if train_name is None or eval_split is not None:
                raise problems[0]
            return f"what is in {train_name!r} cannot be told from {' and '.join(map(repr, names))}"
    if origin != train_name:
        label = find_columns(source.splits[origin], image_column, label_column, dataset_id).label
        if not isinstance(source.splits[origin].features[label], ClassLabel):
            if train_name is not None:
                return f"without {train_name!r} it is not known which classes column {label!r} has"
            raise DataError(
                f"dataset {dataset_id!r}: column {label!r} does not say which classes there are (feature ClassLabel), "
                "and there is no train split to take them from. Choose another --label-column."
            )
    opened = settle_columns(source, dataset_id, origin, image_column, label_column)
    test = _find_test(opened, eval_split, train_name, notes)
    if test is None:
        if train_name is None:
            raise _no_test(source, dataset_id, train_name)
        if source.on_demand:
            return held_out
        train = opened.split(train_name)
        check_labels(train)
        _, test, _ = hold_out(train, _test_size(opened, train), 0, seed, notes)
        assert test is not None
    return EvalData(test, opened.class_names, opened.num_classes, dataset_id, source.hub_id, source.revision, notes)


def _with_alias(
    dataset_id: str, source: Source, label_column: str | None, eval_split: str | None
) -> tuple[str | None, str | None, list[str]]:
    """(label column, test split, notes), where nothing was typed as the alias has them."""
    alias = find_alias(dataset_id)
    if alias is None:
        return label_column, eval_split, list(source.notes)
    usual = alias.eval_split if alias.eval_split in source.splits else None
    notes = ([alias.note] if alias.note else []) + source.notes
    if Path(dataset_id).is_dir():
        notes.append(f"the folder {dataset_id} is not read, but the dataset of that name: for it give ./{dataset_id}")
    return label_column or alias.label_column, eval_split or usual, notes


def _test_names(source: Source, eval_split: str | None, train_name: str | None, dataset_id: str) -> list[str]:
    """The splits that may be the test split, the best first: what was typed, else test and validation."""
    typed = _named_split(source.splits, eval_split, None, "--eval-split", dataset_id, notes=source.notes)
    if typed is not None:
        return [typed]
    usual = [_named_split(source.splits, None, u, "", dataset_id, required=False) for u in ("test", "validation")]
    return [name for name in usual if name is not None and name != train_name]


def _find_test(
    opened: LabelledSource, eval_split: str | None, train_name: str | None, notes: list[str]
) -> ImageSplit | None:
    """The test split that was typed, else the first labelled one; None: hold one out of train."""
    for name in _test_names(opened.source, eval_split, train_name, opened.dataset_id):
        if eval_split is None:
            test = _usable_split(opened, name, notes, raised=True)
        else:
            test = opened.split(name)
            check_labels(test)
        if test is not None:
            if not test.streaming and len(set(test.labels())) == 1:
                notes.append(f"all labels of {name!r} are one class: are the true ones not public?")
            if name == train_name:
                notes.append(f"the test split is the train split {name!r} itself: the results are no test")
            return test
    return None


def _usable_split(opened: LabelledSource, name: str, notes: list[str], raised: bool = False) -> ImageSplit | None:
    """A split that nobody named; None, and a note, where it has no labels or others than the dataset's. With ``raised``
    some other labels, but not all, are an error."""
    split, why = None, opened.shortcoming(name)
    if why is None:
        try:
            split = opened.split(name)
        except OtherClasses as error:
            if raised and error.some:
                raise
            why = str(error)
    if split is None:
        note = f"split {name!r} is not used: {why}"
        notes += [] if note in notes else [note]
        return None
    check_labels(split)
    return split


def _test_size(opened: LabelledSource, train: ImageSplit) -> int:
    """How many images to hold out as the test split. Raises DataError when none can be."""
    size = _held_out_size(train, 0.1, None)
    if not size:
        raise _no_test(opened.source, opened.dataset_id, train.name)
    return size


def _no_test(source: Source, dataset_id: str, train_name: str | None) -> DataError:
    why = "too few (or an unknown number of) images" if train_name is not None else "none called train"
    return DataError(
        f"dataset {dataset_id!r} has no labelled test or validation split, and {why} to hold out a test set. Name one "
        f"with --eval-split: {', '.join(source.splits)}."
    )


def _check_sizes(validation_size: float | int | None, limit_train: int | None, limit_eval: int | None) -> None:
    for flag, value in (("--limit-train", limit_train), ("--limit-eval", limit_eval)):
        if value is not None and value < 1:
            raise DataError(f"{flag} {value} is below 1; give a number of images, or leave it out to use all.")
    if validation_size is not None and (
        validation_size < 0 or (validation_size > 1 and validation_size != int(validation_size))
    ):
        raise DataError(
            f"--validation-size {validation_size} is neither a number of images nor a share below 1 "
            "(such as 1000 or 0.1; 0 for no validation)."
        )


def _named_split(
    splits: Mapping[str, RawSplit],
    typed: str | None,
    usual: str | None,
    flag: str,
    dataset_id: str,
    required: bool = True,
    notes: Sequence[str] = (),
) -> str | None:
    """The split that was typed, else the one under a usual name, else the only one (for train)."""
    if typed is not None:
        if typed not in splits:
            raise DataError(
                f"dataset {dataset_id!r} has no split {typed!r}; {flag} can be {', '.join(splits)}."
                + did_you_mean(typed, splits)
                + "".join(f" {note}." for note in notes if note.startswith(f"{typed}/"))
            )
        return typed
    if usual is None:
        return None
    for name in SPLIT_NAMES[usual]:
        if name in splits:
            return name
    for own in splits:
        if own.lower() in SPLIT_NAMES[usual]:
            return own
    if not required:
        return None
    if len(splits) == 1:
        return next(iter(splits))
    raise DataError(
        f"dataset {dataset_id!r} has no split named {usual!r}; choose one with {flag}: {', '.join(splits)}."
    )


def _held_out_size(split: ImageSplit, size: float | int, most: int | None, already: int = 0) -> int:
    """A share (below 1) or a count of what ``split`` has left, as a count; 0 when a share is of the unknown."""
    if size >= 1:
        return int(size)
    if split.num_examples is None:
        return 0
    count = round((split.num_examples - already) * size)
    return count if most is None else min(most, count)


def _describe(split: ImageSplit | None) -> str:
    if split is None:
        return "none"
    count = "an unknown number of" if split.num_examples is None else f"{split.num_examples:,}"
    return f"{count} images of {split.name!r}"
