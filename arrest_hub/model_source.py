"""Model id -> a folder on this machine with config.json and weights, or a bare timm architecture.

Nothing here builds a model. What can be known without the network or the weights (a misspelt name, an
architecture no library has, a config that wants remote code) is refused before anything is downloaded.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from timm.models import get_deprecated_models, get_pretrained_cfg, is_model, list_models, split_model_name_tag

import arrest_hub.architectures  # noqa: F401  (registers the CIFAR architectures in timm)
from arrest_hub.errors import ArrestError, BackboneError, HashMismatch, did_you_mean, hub_failure
from arrest_hub.model_config import check_config, read_config

PICKLE_SUFFIXES = (".bin", ".pth", ".pt")
_PREPROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_SAFETENSORS_FILES = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
_PICKLE_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin")
_ALLOW_PICKLE = (
    "if you trust where it comes from, allow pickled weights with --allow-pickle (allow_pickle=True), "
    "which still executes no code from the file"
)


@dataclass(frozen=True)
class ModelSource:
    """Where a model came from, as a model card states it.

    ``library`` is "timm" or "transformers"; ``architecture`` timm's architecture name or transformers' class
    name. ``revision`` is a commit on the Hub, None for local folders and random initialisations. With
    ``pretrained`` False the weights are a random initialisation. ``hub_id`` is the repo id, None if local.
    """

    model_id: str
    library: str
    architecture: str
    revision: str | None
    pretrained: bool
    hub_id: str | None

    @property
    def pinned_id(self) -> str | None:
        """``org/name@commit``, by which the same weights are found again; None if it is not on the Hub."""
        return f"{self.hub_id}@{self.revision}" if self.hub_id else None


@dataclass(frozen=True)
class LocatedModel:
    """A found model: ``folder`` and its parsed ``config`` are None for a bare timm architecture."""

    source: ModelSource
    folder: Path | None = None
    config: dict[str, Any] | None = None


def locate(
    model_id: str,
    *,
    revision: str | None = None,
    pretrained: bool = True,
    head_wanted: bool = True,
    allow_pickle: bool = False,
    cache_dir: str | Path | None = None,
) -> LocatedModel:
    """Find ``model_id`` (see ``backbones.load_backbone`` for the forms it takes), downloading if need be.

    Without ``head_wanted`` a network without a classification head serves too. Raises BackboneError for an id that
    names nothing usable, HubError when the Hub cannot serve it.
    """
    path = Path(model_id).expanduser()
    name, _, suffix = model_id.partition("@")
    is_hub_id = not path.is_dir() and name.count("/") == 1 and name[0] not in "./~" and name[-1] != "/"
    if is_hub_id:
        if suffix and revision and suffix != revision:
            raise BackboneError(
                f"Model {model_id!r} names revision {suffix!r}, but revision={revision!r} was given too. "
                "Give one of them."
            )
        if path.is_file():
            raise BackboneError(f"Model {model_id!r} is a file. Give the folder it lies in.")
        return _from_hub(model_id, name, suffix or revision, pretrained, head_wanted, allow_pickle, cache_dir)
    if revision:
        raise BackboneError(
            f"revision={revision!r} was given, but {model_id!r} is not a Hub id. "
            "Only org/name on the Hub has revisions; leave the revision out."
        )
    # a folder without a config.json may happen to carry an architecture's name
    if path.is_dir() and ((path / "config.json").is_file() or not is_model(model_id)):
        return _from_folder(model_id, path, pretrained, head_wanted, allow_pickle)
    if path.is_file():
        raise BackboneError(f"Model {model_id!r} is a file. Give the folder it lies in, with its config.json.")
    if os.sep in model_id or model_id.startswith((".", "~")):
        raise BackboneError(
            f"Model {model_id!r}: there is no such folder. Give the path of a folder with a config.json, "
            "or org/name for a model on the Hub."
        )
    return _from_architecture_name(model_id)


def find_weights(folder: Path, model_id: str, library: str, allow_pickle: bool) -> Path:
    """The weights file in ``folder`` (for transformers possibly the index of its shards).

    Safetensors are preferred; pickles count only with ``allow_pickle``. Raises BackboneError without weights.
    """
    names = ["model.safetensors"]
    if library == "transformers":
        names.append("model.safetensors.index.json")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    pickles = sorted(p for p in folder.iterdir() if p.suffix in PICKLE_SUFFIXES and p.is_file())
    others = sorted(folder.glob("*.safetensors")) if library == "timm" else []
    if len(others) == 1:
        return others[0]
    if len(others) > 1:
        raise BackboneError(
            f"Model {model_id!r} has several weights files ({', '.join(p.name for p in others)}). "
            "Keep the one to use and name it model.safetensors."
        )
    if not pickles:
        raise BackboneError(
            f"Model {model_id!r} has a config.json but no weights (model.safetensors). Save the weights beside "
            "it (from Python, pretrained=False starts from a random initialisation)."
        )
    if not allow_pickle:
        raise BackboneError(
            f"Model {model_id!r} has only pickled weights ({pickles[0].name}) and no model.safetensors. "
            f"Convert them to safetensors, or, {_ALLOW_PICKLE}."
        )
    preferred = folder / "pytorch_model.bin"
    index = folder / "pytorch_model.bin.index.json"
    if library == "transformers" and index.is_file():
        return index
    return preferred if preferred in pickles else pickles[0]


def preprocessor_files(folder: Path) -> list[Path]:
    """Where an image processor was saved beside a transformers model."""
    return [path for name in _PREPROCESSOR_FILES if (path := folder / name).is_file()]


def companion_file(source: ModelSource, name: str, cache_dir: str | Path | None = None) -> Path | None:
    """A small file that lies beside a model (its card, its results), at the model's own commit; None if there is none.

    Raises:
        HubError: the Hub cannot serve it. HashMismatch: its content is not what the Hub states.
    """
    if source.hub_id is None:
        path = Path(source.model_id).expanduser() / name
        return path if path.is_file() else None
    # a commit never changes: what the cache knows of it, also that it lacks a file, needs no Hub
    known = try_to_load_from_cache(source.hub_id, name, cache_dir, source.revision)
    if known is _CACHED_NO_EXIST:
        return None
    try:
        path = Path(known or hf_hub_download(source.hub_id, name, revision=source.revision, cache_dir=cache_dir))
        check_hash(path, source.hub_id)
        return path
    except Exception as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        failure = hub_failure(error, "model", source.hub_id)
        if failure is not None:
            raise failure from error
        raise


def check_hash(path: Path, repo_id: str) -> None:
    """Refuse a downloaded file whose content is not what the Hub states, and take it out of the cache.

    The client checks no more than a file's size. Its cache keeps a file under the hash that the Hub gave for it: git's
    of a small one, SHA-256 of a large one; that name may in turn be a link into what several repositories share, under
    Xet's hash. Where the cache cannot link (some Windows) there is nothing to compare with.

    Raises:
        HashMismatch: the content is another one.
    """
    if not path.is_symlink():
        return
    kept = path.parent / os.readlink(path)
    expected = kept.name
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", expected):
        return
    if file_hash(kept, git=len(expected) == 40) != expected:
        kept.resolve().unlink()
        kept.unlink(missing_ok=True)
        raise HashMismatch(
            f"{path.name} of {repo_id!r} is not the file that the Hub states (its hash differs): the download or the "
            "copy in the cache was damaged, and is removed. Run this again to download it anew."
        )


def file_hash(path: Path, *, git: bool) -> str:
    """SHA-256 of a file, or (``git``) the SHA-1 that git calls it by; read in pieces."""
    size = path.stat().st_size
    begun = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False) if git else hashlib.sha256()
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: begun).hexdigest()


def _from_architecture_name(model_id: str) -> LocatedModel:
    architecture, tag = split_model_name_tag(model_id)
    if is_model(architecture) and not tag:
        current = get_deprecated_models().get(architecture, architecture)
        if current != architecture:
            hint = f" Use 'timm/{current}' for its weights." if current else ""
            raise BackboneError(f"Model {model_id!r} is a name that timm has retired.{hint}")
        return LocatedModel(ModelSource(model_id, "timm", architecture, None, False, None))
    if is_model(architecture):
        raise BackboneError(
            f"Model {model_id!r} names pretrained weights, but without the organisation that holds them. "
            f"Write 'timm/{model_id}' for the weights, or {architecture!r} for a random initialisation."
        )
    raise BackboneError(
        f"Model {model_id!r} is neither a folder nor a timm architecture."
        f"{did_you_mean(model_id, list_models(), n=3)} Weights on the Hub are written org/name, "
        "such as 'timm/resnet50.a1_in1k'."
    )


def _from_folder(model_id: str, folder: Path, pretrained: bool, head_wanted: bool, allow_pickle: bool) -> LocatedModel:
    config_file = folder / "config.json"
    if not config_file.is_file():
        if (folder / "export/config.json").is_file():
            network = os.path.join(model_id, "export")
            raise BackboneError(f"Model folder {model_id!r} is a run: give its network, {network!r}.")
        raise BackboneError(
            f"Model folder {model_id!r} has no config.json, so its architecture is unknown. Give a folder "
            "written by timm (save_for_hf with safe_serialization=True) or by transformers (save_pretrained), or a "
            "run's export/."
        )
    config = read_config(config_file, model_id)
    library, architecture = check_config(config, model_id, head_wanted=head_wanted)
    if pretrained:
        find_weights(folder, model_id, library, allow_pickle)
    source = ModelSource(model_id, library, architecture, None, pretrained, None)
    return LocatedModel(source, folder, config)


def _from_hub(
    model_id: str,
    repo_id: str,
    revision: str | None,
    pretrained: bool,
    head_wanted: bool,
    allow_pickle: bool,
    cache_dir: str | Path | None,
) -> LocatedModel:
    if repo_id.startswith("timm/"):
        repo_id = _timm_repo_id(repo_id.removeprefix("timm/"))
    try:
        config_file = Path(hf_hub_download(repo_id, "config.json", revision=revision, cache_dir=cache_dir))
        check_hash(config_file, repo_id)
        config = read_config(config_file, model_id)
        library, architecture = check_config(config, model_id, head_wanted=head_wanted)
        # the cache keeps each commit in a folder of its name: from here on the commit is pinned
        commit = config_file.parent.name
        wanted = ["config.json"]
        if library == "transformers":
            wanted += _PREPROCESSOR_FILES
        if pretrained:
            wanted += _SAFETENSORS_FILES

        def download(patterns: list[str]) -> Path:
            def fetch(local: bool) -> Path:
                return Path(
                    snapshot_download(
                        repo_id,
                        revision=commit,
                        cache_dir=cache_dir,
                        allow_patterns=patterns,
                        local_files_only=local,
                    )
                )

            try:
                return fetch(local=False)
            except Exception as error:
                if hub_failure(error, "model", repo_id) is None:
                    raise
                try:  # a commit never changes: what the cache holds of it serves without the network
                    return fetch(local=True)
                except LocalEntryNotFoundError:
                    raise error from None

        folder = download(wanted)
        if pretrained and not any(folder.glob("model*.safetensors")):
            if not allow_pickle:
                raise BackboneError(
                    f"Model {model_id!r} has no model.safetensors on the Hub (or, without a network, in the cache). "
                    f"Choose a repository with safetensors weights; or, if it has a pytorch_model.bin, {_ALLOW_PICKLE}."
                )
            folder = download([*wanted, *_PICKLE_FILES])
        for file in sorted(folder.iterdir()):
            if any(fnmatch(file.name, pattern) for pattern in [*wanted, *_PICKLE_FILES * allow_pickle]):
                check_hash(file, repo_id)
    except ArrestError:
        raise
    except Exception as error:  # the client's errors have no common base; others are raised again below
        failure = hub_failure(error, "model", repo_id)
        if failure is not None:
            raise failure from error
        if isinstance(error, EntryNotFoundError):
            raise BackboneError(
                f"Model {repo_id!r} on the Hub has no config.json, so its architecture is unknown. "
                "Give a timm or transformers image classifier."
            ) from error
        if isinstance(error, HFValidationError):
            raise BackboneError(
                f"Model {model_id!r} is not a valid Hub id ({error}). Write org/name or org/name@revision."
            ) from error
        raise
    if pretrained:
        find_weights(folder, model_id, library, allow_pickle)
    source = ModelSource(model_id, library, architecture, commit, pretrained, repo_id)
    return LocatedModel(source, folder, config)


def _timm_repo_id(name: str) -> str:
    """timm model name, with or without a tag -> the Hub repo that holds its weights. No network."""
    architecture, tag = split_model_name_tag(name)
    if not is_model(architecture):
        raise BackboneError(
            f"Model 'timm/{name}' is unknown to timm {timm.__version__}."
            f"{did_you_mean(architecture, list_models(), n=3)} List the names with timm.list_models()."
        )
    current = get_deprecated_models().get(architecture)
    if current:
        raise BackboneError(f"Model 'timm/{name}' is a name that timm has retired. Use 'timm/{current}'.")
    tagged = [n for n in list_models(architecture, pretrained=True, include_tags=True) if "." in n]
    if tag and name not in tagged:
        known = f" It has {', '.join(repr('timm/' + n) for n in tagged)}." if tagged else ""
        raise BackboneError(f"Model 'timm/{name}': timm knows no weights {tag!r} of {architecture!r}.{known}")
    cfg = get_pretrained_cfg(name)
    if cfg is None or not cfg.hf_hub_id:
        raise BackboneError(
            f"Model 'timm/{name}' has no weights on the Hub. Write {architecture!r} for a random initialisation."
        )
    return str(cfg.hf_hub_id)
