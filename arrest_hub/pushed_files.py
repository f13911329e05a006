"""What of an `export/` is pushed: its files with their hashes, and how they differ from a repository's. No torch."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from arrest_hub.card_facts import FIGURES, threat_tags
from arrest_hub.errors import ConfigError
from arrest_hub.training_record import FILE_NAME as RECORD

CARD = "README.md"
TRAINING_CONFIG = "training_config.yaml"
PICKLES = (".bin", ".pth", ".pt", ".pkl", ".pickle", ".ckpt")
# of networks in formats that no push of ours has
_OTHER_WEIGHTS = (".gguf", ".onnx", ".h5", ".keras", ".msgpack", ".tflite", ".pb", ".npz", ".mlmodel")
# what an earlier push may have left in the repository and this one would not overwrite
OWN_FILES = ("model.safetensors", "model.safetensors.index.json", "preprocessor_config.json", "verdicts.parquet",
             *(f"figures/{name}" for name in FIGURES))  # fmt: skip


@dataclass(frozen=True)
class LocalFile:
    """A file to push: where its content is (a path, or the bytes), and its hashes as git and LFS make them."""

    content: Path | bytes
    size: int
    sha256: str
    git_sha1: str


def local_files(export: Path, card: bytes) -> dict[str, LocalFile]:
    """What is pushed, by its path in the repository: every file in ``export``, with ``card`` as its README.md.

    Raises:
        ConfigError: a link leads out of the folder, or there are pickles or no weights.
    """
    problems, files = [], {CARD: local_file(card)}
    for path in sorted(export.rglob("*")):
        name = path.relative_to(export).as_posix()
        if path.is_symlink() and not path.resolve().is_relative_to(export.resolve()):
            problems.append(f"{path} is a link that leads out of the folder: put the file there instead, or remove it.")
        elif path.is_symlink() and path.is_dir():
            problems.append(f"{path} is a link to a folder: put the files there instead, or remove it.")
        elif path.suffix.lower() in PICKLES:
            problems.append(f"{path} is a pickle, which nobody should load: remove it. The weights are safetensors.")
        elif path.is_dir() or name == CARD or _is_left_out(name):
            continue
        elif not path.is_file():
            problems.append(f"{path} is neither a file nor a folder: remove it.")
        else:
            files[name] = local_file(path)
    if not any(name.endswith(".safetensors") for name in files):
        problems.append(f"{export} has no weights (model.safetensors).")
    if problems:
        raise ConfigError(problems)
    return dict(sorted(files.items()))


def weight_files(folder: Path) -> dict[str, str]:
    """The files of weights in a model folder as `export` names them, with their SHA-256."""
    own = (path for path in sorted(folder.glob("*.safetensors")) if is_own(path.name))
    return {path.name: local_file(path).sha256 for path in own}


def weight_problems(files: dict[str, LocalFile], measured: dict[str, str]) -> list[str]:
    """Why the network that is to be pushed is not the one that was measured, or cannot be loaded: a line for each.

    ``measured``: what `weight_files` said then; empty: not known.
    """
    problems = []
    if architecture_name(files["config.json"].content) == "unknown":
        problems.append("config.json names no architecture, so that nobody could load the model.")
    weights = {name: file for name, file in files.items() if name.endswith(".safetensors") and is_own(name)}
    for name, file in weights.items():
        if isinstance(file.content, Path) and not _is_whole(file.content):
            problems.append(f"{name} is damaged: it is not as long as its header says.")
        elif measured and measured.get(name) != file.sha256:
            problems.append(
                f"{name} is not what the figures in results.json are of: export the run again with "
                "arrest-finetune --resume, or measure this network in a folder of its own."
            )
    return problems + [f"{name}, which was measured, is missing." for name in measured if name not in weights]


def _is_whole(path: Path) -> bool:
    """Whether a file of safetensors holds all that its header names (https://huggingface.co/docs/safetensors)."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            return False
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return False
    return path.stat().st_size == 8 + length + max(ends, default=0)


def others(files: dict[str, LocalFile]) -> list[str]:
    """What is pushed of an `export/` that no part of this package, timm or transformers wrote there, by its name."""
    known = (*OWN_FILES, CARD, "config.json", "results.json", TRAINING_CONFIG, RECORD)
    return [name for name in files if name not in known and not is_own(name)]


def local_file(content: Path | bytes) -> LocalFile:
    """A file to push, read once for its hashes."""
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    sha256, sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    if isinstance(content, bytes):
        sha256.update(content)
        sha1.update(content)
    else:
        with content.open("rb") as file:
            while block := file.read(1 << 20):
                sha256.update(block)
                sha1.update(block)
    return LocalFile(content, size, sha256.hexdigest(), sha1.hexdigest())


def differing(files: dict[str, LocalFile], remote: dict[str, tuple[str, str | None]]) -> list[str]:
    """The files that the repository lacks or holds with other content."""
    same = [
        path for path, file in files.items()
        if path in remote and (remote[path][1] == file.sha256 if remote[path][1] else remote[path][0] == file.git_sha1)
    ]  # fmt: skip
    return [path for path in files if path not in same]


def architecture_name(config: Path | bytes) -> str:
    """What a config.json calls its network; "unknown" if it cannot be read."""
    try:
        values = json.loads(config if isinstance(config, bytes) else config.read_bytes())
        return str(values.get("architecture") or values["architectures"][0])
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return "unknown"


def threat_model(config: Path | bytes) -> str | None:
    """The perturbations that a training_config.yaml trains for, as `threat_tags` writes them ("linf-8/255"); None if
    it cannot be read."""
    try:
        values = yaml.safe_load(config if isinstance(config, bytes) else config.read_bytes())
        return threat_tags(values["norm"], values["eps"])[-1]
    except (ValueError, KeyError, TypeError, ZeroDivisionError, yaml.YAMLError):
        return None


def _is_left_out(name: str) -> bool:
    """Hidden files, and what is half of a file since its writer was killed."""
    return any(part.startswith(".") for part in Path(name).parts) or name.endswith(".tmp")


def is_own(path: str) -> bool:
    """Whether a file in a repository is one that an earlier push put there, if this one does not have it."""
    return path in OWN_FILES or re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", path) is not None


def is_weights(path: str) -> bool:
    """Whether a file in a repository is by its name the weights of some network."""
    return Path(path).suffix.lower() in (".safetensors", *PICKLES, *_OTHER_WEIGHTS)
