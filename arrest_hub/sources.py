"""A dataset id, as the user types it, becomes the raw `datasets` splits behind it.

Known names, local folders (save_to_disk, Parquet, image folders) and ids on the Hub; `splits.py` chooses
among the splits found here.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files as package_files
from pathlib import Path
from typing import TypeAlias
from urllib.parse import quote

import datasets
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, IterableDataset
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.file_download import repo_folder_name

from arrest_hub.errors import ArrestError, DataError, HubError, did_you_mean, hub_failure
from arrest_hub.folder_checks import METADATA, check_metadata, is_metadata
from arrest_hub.image_folder import open_image_folder, walk
from arrest_hub.on_demand import SplitsOnDemand, is_prepared, keep_names, open_apart, opens_apart, prepared, read_names

RawSplit: TypeAlias = Dataset | IterableDataset


@dataclass(frozen=True)
class Alias:
    """A short name and what is peculiar about its dataset."""

    hub_id: str | None
    label_column: str | None = None
    eval_split: str | None = None
    note: str | None = None


ALIASES: dict[str, Alias] = {
    "digits": Alias(None),
    "cifar10": Alias("uoft-cs/cifar10", label_column="label"),
    "cifar100": Alias("uoft-cs/cifar100", label_column="fine_label"),
    "imagenet": Alias(
        "ILSVRC/imagenet-1k",
        label_column="label",
        eval_split="validation",
        note="the labels of ImageNet's test split are not public, so its validation split is the test split",
    ),
}


@dataclass
class Source:
    """The splits of a dataset by name, all map-style or all streaming, with where they come from.

    ``sizes`` counts the images of streams where that is known; ``notes`` are sentences for the user.
    ``on_demand``: a split is only downloaded and converted when it is first taken out of ``splits``, which may
    then raise what `open_source` raises. ``parquet``: the local Parquet files of each split.
    """

    splits: Mapping[str, RawSplit]
    hub_id: str | None = None
    revision: str | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    on_demand: bool = False
    parquet: dict[str, list[str]] = field(default_factory=dict)


def find_alias(dataset_id: str) -> Alias | None:
    """What is known about ``name``, ``name:config`` or ``name@revision``."""
    alias = ALIASES.get(re.split("[:@]", dataset_id)[0])
    return alias if alias is None or alias.hub_id or dataset_id in ALIASES else None


def open_source(
    dataset_id: str, *, streaming: bool = False, on_demand: bool = False, cache_dir: str | None = None
) -> Source:
    """Open every split of a dataset; nothing is chosen, held out or decoded.

    ``dataset_id``: a known name, a folder, or ``org/name[:config][@revision]`` on the Hub. ``streaming``
    returns `datasets.IterableDataset`s, which fetch what is read. ``on_demand`` (without ``streaming``) fetches
    no split that is not asked for, where the format allows it (`Source.on_demand`, Parquet): the others have
    nothing to fetch or are opened whole. ``cache_dir`` is where `datasets` keeps its files (its own default when
    None).

    Raises DataError (unknown name, no such folder, nothing usable in it) or HubError (not found, gated,
    no network).
    """
    alias = find_alias(dataset_id)
    if alias is not None and alias.hub_id is None:
        return _as_source(_digits(), streaming)
    if alias is None:
        path = Path(dataset_id).expanduser()
        if path.is_dir():
            return _open_folder(path, dataset_id, streaming, on_demand, cache_dir)
        if path.is_file():
            raise DataError(f"dataset {dataset_id!r} is a file; give the folder that holds it, {str(path.parent)!r}.")
        if dataset_id.startswith((".", "~")) or path.is_absolute() or dataset_id.split("@")[0].count("/") > 1:
            raise DataError(f"dataset folder {dataset_id!r} does not exist. Check the path.")
    hub_id, config, revision = _parse_hub_id(_without_alias(dataset_id))
    return _open_hub(hub_id, config, revision, streaming, on_demand, cache_dir)


def same_dataset(first: str, second: str) -> bool:
    """Whether two names may be of the same images, at whatever revision: ids, or what the folders are called.

    A configuration that one id leaves open may be the one that the other names.
    """
    parts = []
    for name in (first, second):
        try:
            hub_id, config, _ = _parse_hub_id(_without_alias(name))
        except DataError:
            return first == second
        parts.append((hub_id.lower(), None if config == "default" else config))
    (one, one_config), (other, other_config) = parts
    return one == other and (None in (one_config, other_config) or one_config == other_config)


def _without_alias(dataset_id: str) -> str:
    """A known name with what follows it -> the id on the Hub with the same."""
    alias, name = find_alias(dataset_id), re.split("[:@]", dataset_id)[0]
    return dataset_id if alias is None or alias.hub_id is None else alias.hub_id + dataset_id[len(name) :]


def _parse_hub_id(dataset_id: str) -> tuple[str, str | None, str | None]:
    """``org/name[:config][@revision]`` -> its three parts."""
    match = re.fullmatch(r"(?P<id>[\w.\-]+/[\w.\-]+)(?::(?P<config>[^@:]+))?(?:@(?P<revision>[^@:]+))?", dataset_id)
    if match is None:
        raise DataError(
            f"dataset {dataset_id!r} is no known name ({', '.join(ALIASES)}), no folder here, and no Hub id "
            f"(org/name, org/name:config, org/name@revision).{did_you_mean(dataset_id, ALIASES)}"
        )
    return match["id"], match["config"], match["revision"]


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars while local files are read (downloads keep theirs)."""
    was_enabled = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if was_enabled:
            enable_progress_bars()


def _as_source(splits: dict[str, Dataset], streaming: bool) -> Source:
    if not streaming:
        return Source(splits)
    streams = {name: split.to_iterable_dataset() for name, split in splits.items()}
    return Source(streams, sizes={name: len(split) for name, split in splits.items()})


def _digits() -> dict[str, Dataset]:
    splits = {}
    for name in ("train", "test"):
        with package_files("arrest_hub").joinpath("digits", f"{name}.parquet").open("rb") as file:
            splits[name] = Dataset(pq.read_table(file))
    return splits


def _open_hub(
    hub_id: str, config: str | None, revision: str | None, streaming: bool, on_demand: bool, cache_dir: str | None
) -> Source:
    commit, refusal = _look_up(hub_id, revision)

    @cache
    def build() -> datasets.DatasetBuilder:
        with _hub_errors(hub_id, refusal):
            builder = datasets.load_dataset_builder(hub_id, name=config, revision=revision, cache_dir=cache_dir)
        found = _commit_of(builder)
        # where the Hub gives nothing, `datasets` takes the newest copy in its cache, whichever revision that is
        if found and found != (commit or _cached_commit(hub_id, revision or "main")):
            raise HubError(
                f"dataset {hub_id!r} cannot be fetched at revision {revision or 'main'!r}, and the newest copy on this "
                "machine is of another. Check the network and your access token (or unset HF_HUB_OFFLINE), or give "
                f"'{hub_id}@{found}' for that copy."
            )
        return builder

    notes = []
    if on_demand:
        at = commit or _cached_commit(hub_id, revision or "main")
        root = _own_cache(cache_dir) / "hub" / hub_id.replace("/", "___") / f"config-{quote(config or '', safe='')}"
        names = read_names(root / at) if at else None
        if names is None and opens_apart(build()) and not is_prepared(build()):
            at = _commit_of(build())
            names = keep_names(root / at, build()) if at else None
        if names is not None:
            folder = root / str(at)

            def open_split(name: str) -> Dataset:
                with _hub_errors(hub_id, refusal):
                    return open_apart(folder, name, build)

            return Source(SplitsOnDemand(names, open_split), hub_id, at, on_demand=True)
        if not is_prepared(build()):
            notes = [f"every split of {hub_id!r} is fetched: only a dataset in Parquet files can be fetched by split"]
    builder = build()
    with _hub_errors(hub_id, refusal):
        if streaming:
            splits = builder.as_streaming_dataset()
        else:
            builder.download_and_prepare()
            splits = prepared(builder)
    sizes = {name: info.num_examples for name, info in (builder.info.splits or {}).items() if info.num_examples}
    named = {str(name): split for name, split in splits.items()}
    return Source(named, hub_id, _commit_of(builder), sizes, notes)


def _commit_of(builder: datasets.DatasetBuilder) -> str | None:
    """For a dataset on the Hub the builder's hash is the commit it was read at."""
    return builder.hash if re.fullmatch(r"[0-9a-f]{40}", builder.hash or "") else None


@contextmanager
def _hub_errors(hub_id: str, refusal: Exception | None) -> Iterator[None]:
    """Failures inside become one HubError or DataError; ``refusal`` is what the Hub first said, if it refused."""
    try:
        yield
    except ArrestError:
        raise
    except Exception as error:  # told apart below; what is not understood is raised as it is
        if refusal is None and isinstance(error, DatasetNotFoundError):
            refusal = _denial(hub_id)
        failure = (hub_failure(refusal, "dataset", hub_id) if refusal else None) or hub_failure(
            error, "dataset", hub_id
        )
        if failure is not None:
            raise failure from error
        if isinstance(error, (DatasetsError, ValueError, FileNotFoundError)):
            # for example: no such config, a config is needed, no data files, columns that do not agree
            raise DataError(f"dataset {hub_id!r} cannot be loaded: {_first_lines(error)}") from error
        raise


def _look_up(hub_id: str, revision: str | None) -> tuple[str | None, Exception | None]:
    """The commit of a revision on the Hub, or the error that says why it is not known.

    `datasets` replaces the client's errors by its own, from which the reason can no longer be told.
    """
    if datasets.config.HF_HUB_OFFLINE:  # also set by HF_DATASETS_OFFLINE, of which the client knows nothing
        return None, None
    try:
        info = HfApi(endpoint=datasets.config.HF_ENDPOINT).dataset_info(hub_id, revision=revision, timeout=30)
    except Exception as error:  # raised by the caller, unless the dataset is in the cache
        return None, error
    script = hub_id.split("/")[1] + ".py"
    if any(file.rfilename == script for file in info.siblings or ()):
        raise DataError(
            f"dataset {hub_id!r} is made by a script ({script}), which is never executed. If the Hub has converted it "
            f"to Parquet, give '{hub_id}@refs/convert/parquet'; otherwise choose another dataset."
        )
    return info.sha, None


def _denial(hub_id: str) -> Exception | None:
    """Why the files of a dataset that exists may not be read, such as a gated one's."""
    try:
        HfApi(endpoint=datasets.config.HF_ENDPOINT).auth_check(hub_id, repo_type="dataset")
    except Exception as error:  # the caller tells what it means
        return error
    return None


def _cached_commit(hub_id: str, revision: str) -> str | None:
    """The commit that the client's cache has noted for a branch or tag; a commit is itself."""
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    folder = repo_folder_name(repo_id=hub_id, repo_type="dataset")
    note = Path(HF_HUB_CACHE) / folder / "refs" / revision
    return note.read_text(encoding="utf-8").strip() if note.is_file() else None


def _own_cache(cache_dir: str | None) -> Path:
    """What is cached beside the datasets that `datasets` itself knows of."""
    return Path(cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser() / "arrest-hub"


def _open_folder(path: Path, typed: str, streaming: bool, on_demand: bool, cache_dir: str | None) -> Source:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _as_source(_open_saved(path, typed), streaming)
    files = sorted(walk(path))
    names = {os.path.basename(file).lower() for file in files}
    tabular = any(name.endswith((".parquet", ".arrow", ".tar")) for name in names)
    if tabular or names & METADATA:
        found = _open_data_files(path, typed, files, streaming, on_demand, cache_dir)
        if found is not None:
            return found
    splits, notes = open_image_folder(path, typed, shuffle=streaming)
    source = _as_source(splits, streaming)
    source.notes += notes
    return source


def _open_saved(path: Path, typed: str) -> dict[str, Dataset]:
    try:
        saved = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise DataError(
            f"dataset folder {typed!r} (save_to_disk) is damaged, or one of its splits is empty: {_first_lines(error)}"
        ) from error
    parts = dict(saved) if isinstance(saved, DatasetDict) else {saved.split or "train": saved}
    # a format that was set before saving is how somebody wanted to look at it
    return {str(name): part.with_format(None) for name, part in parts.items()}


def _open_data_files(
    path: Path, typed: str, files: list[str], streaming: bool, on_demand: bool, cache_dir: str | None
) -> Source | None:
    """Parquet and the other formats that `datasets` reads, splits found by file name; None for image files without
    metadata, among which a file of another format lies."""
    if special := re.search(r"[*?\[]", str(path.resolve())):  # `datasets` takes it for a pattern of other folders
        raise DataError(
            f"dataset folder {typed!r}: its path has a {special[0]!r}, by which `datasets` would read other folders. "
            f"Rename or move {str(path.resolve())!r}, so that it has none of * ? [."
        )
    # `datasets` takes a cached copy for fresh when the paths and mtimes are the same; a copy that keeps the
    # mtime (rsync, cp -p) would give stale data, so the size and the time of the last change count too
    state = hashlib.sha256()
    for file in files:
        stat = os.stat(file)
        state.update(f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ctime_ns}\n".encode())
    root = _own_cache(cache_dir) / state.hexdigest()[:16]
    with _folder_errors(typed):
        builder = datasets.load_dataset_builder(str(path.resolve()), cache_dir=str(root))
        if builder.name == "imagefolder" and not any(is_metadata(file) for file in files):
            return None
        check_metadata(builder, files, typed)
        parquet = dict(builder.config.data_files or {}) if builder.name == "parquet" else {}
        parquet = {str(name): [str(part) for part in parts] for name, parts in parquet.items()}
        if on_demand and opens_apart(builder) and not is_prepared(builder):

            def open_split(name: str) -> Dataset:
                with _folder_errors(typed):
                    return open_apart(root, name, lambda: builder)

            return Source(SplitsOnDemand(builder.config.data_files, open_split), on_demand=True, parquet=parquet)
        if streaming:
            splits = builder.as_streaming_dataset()
        else:
            builder.download_and_prepare()
            splits = prepared(builder)
    sizes = {}
    if streaming:  # `datasets` only knows the sizes after a run without streaming
        for name, parts in (builder.config.data_files or {}).items():
            if all(part.endswith(".parquet") for part in parts):
                sizes[str(name)] = sum(pq.read_metadata(part).num_rows for part in parts)
    return Source({str(name): split for name, split in splits.items()}, sizes=sizes, parquet=parquet)


@contextmanager
def _folder_errors(typed: str) -> Iterator[None]:
    """Reading local files, without progress bars; failures become one DataError."""
    try:
        with _quiet():
            yield
    except (DatasetsError, ValueError, OSError) as error:
        cache = Path(datasets.config.HF_DATASETS_CACHE).expanduser()
        if isinstance(error, OSError) and error.filename and not os.access(_existing(cache), os.W_OK):
            raise DataError(
                f"the cache of `datasets`, {cache}, cannot be written ({error.strerror}): set HF_HOME or "
                "HF_DATASETS_CACHE to a folder that can be."
            ) from error
        raise DataError(f"dataset folder {typed!r} cannot be read: {_first_lines(error)}") from error


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _first_lines(error: Exception) -> str:
    """The first two lines of an error (and of its cause), on one line."""
    text = [str(error)] + ([str(error.__cause__)] if error.__cause__ is not None else [])
    lines = [line.strip() for part in text for line in part.splitlines()[:2] if line.strip()]
    return " ".join(lines) or type(error).__name__
