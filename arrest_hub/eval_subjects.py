"""Who is evaluated on what: the model, the standard network it is compared with, and the images, checked and loaded."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset

from arrest_hub.attacks import frozen_eval
from arrest_hub.backbones import Backbone, load_backbone
from arrest_hub.data import ImageDataset, ImageSplit, to_pixels
from arrest_hub.errors import ArrestError, BackboneError, ConfigError, HubError, first_line
from arrest_hub.eval_config import EvalConfig
from arrest_hub.evaluator import Images, TensorImages, as_logits
from arrest_hub.export import weights_digest
from arrest_hub.folding import foldable
from arrest_hub.labels import match_labels
from arrest_hub.model_source import companion_file
from arrest_hub.pretrained import PretrainedClassifier
from arrest_hub.processes import from_main, main_first
from arrest_hub.results import read_results
from arrest_hub.splits import load_eval_split
from arrest_hub.trained_on import held_out_seed
from arrest_hub.training_record import FILE_NAME as RECORD
from arrest_hub.transforms import Preprocessing, Transform, eval_transform, to_tensor

TensorPair = tuple[Tensor, Tensor]


@dataclass
class Subject:
    """A network to evaluate: ``module`` maps pixels in [0, 1] to logits.

    ``info`` goes into `results.json`, which may be published, so it has no paths; ``hub_id``, with its commit, is set
    for a teacher on the Hub. ``gradients``: whether its logits have a gradient to the pixels, as `count_classes` saw.
    ``pairs``: what of it attacks are to see folded, as `find_folding` found (`foldable`).
    """

    module: nn.Module
    name: str
    info: dict[str, Any] = field(default_factory=dict)
    preprocessing: Preprocessing | None = None
    hub_id: str | None = None
    gradients: bool = True
    pairs: dict[str, str] = field(default_factory=dict)

    @property
    def backbone(self) -> Backbone | None:
        """The module, if it gives representations too."""
        return self.module if isinstance(self.module, Backbone) else None


@dataclass
class EvalImages:
    """The images of an evaluation, with what they are called."""

    images: Images
    dataset: str
    split: str
    class_names: list[str] | None
    revision: str | None
    digest: str
    notes: list[str]
    num_classes: int | None = None


def load_subject(config: EvalConfig, accelerator: Accelerator) -> Subject:
    """The model that the configuration names. Raises BackboneError or HubError, see `load_backbone`."""
    load = partial(load_backbone, config.model, image_size=config.image_size, allow_pickle=config.allow_pickle)
    backbone = main_first(accelerator, load)
    source = backbone.source
    if not source.pretrained:
        raise ConfigError(
            f"--model {config.model} is an architecture without weights: there is nothing to evaluate. Give a folder "
            f"or an id on the Hub, such as 'timm/{config.model}.<tag>'."
        )
    info = {
        "id": source.hub_id or local_name(config.model), "revision": source.revision, "library": source.library,
        "architecture": source.architecture, "parameters": sum(p.numel() for p in backbone.parameters()),
        "weights_sha256": weights_digest(backbone),
    }  # fmt: skip
    return Subject(backbone, config.model, info, backbone.preprocessing)


def local_name(path: str) -> str:
    """What to call a model in a folder in what is published: the folder's name; an export has that of its run."""
    folder = Path(path).expanduser().resolve()
    return folder.parent.name if folder.name == "export" else folder.name


def dataset_name(dataset_id: str) -> str:
    """What to call a dataset in a record that may be published: an id as it is, of a folder its name alone."""
    path = Path(dataset_id).expanduser()
    return path.resolve().name if path.is_dir() else dataset_id


def module_name(module: nn.Module) -> str:
    """What to call a network given as an object: one of ours by its architecture, since its weights may be others."""
    backbone = module.backbone if isinstance(module, PretrainedClassifier) else module
    return backbone.source.architecture if isinstance(backbone, Backbone) else type(module).__name__


def module_subject(module: nn.Module, name: str) -> Subject:
    """A network given as an object; of one that `from_pretrained` gave, the backbone, which knows size and classes."""
    if isinstance(module, PretrainedClassifier):
        module = module.backbone
    if isinstance(module, Backbone):
        return Subject(module, name, _module_info(module, name), module.preprocessing)
    return Subject(module, name, _module_info(module, name))


def _module_info(module: nn.Module, name: str) -> dict[str, Any]:
    count = sum(parameter.numel() for parameter in module.parameters())
    library = {"library": module.source.library} if isinstance(module, Backbone) else {}
    return {"id": name, **library, "architecture": module_name(module), "parameters": count,
            "weights_sha256": weights_digest(module)}  # fmt: skip


def load_images(config: EvalConfig, subject: Subject, accelerator: Accelerator) -> EvalImages:
    """The evaluation split with the model's preprocessing and the model's class numbers.

    Raises:
        ConfigError: the classes of dataset and model differ. DataError, HubError: see `load_eval_split`.
    """
    load = partial(
        load_eval_split,
        config.dataset,
        image_column=config.image_column,
        label_column=config.label_column,
        eval_split=config.eval_split,
        limit_eval=config.limit_eval,
        seed=config.seed,
    )
    data = main_first(accelerator, load)
    origin, held_out, _ = data.split.name.partition("[held-out test]")
    drawn = data.split.drawn_from
    if held_out:

        def look() -> tuple[int | None, list[str]]:
            try:
                return held_out_seed(subject.backbone, subject.name, dataset_name(config.dataset), origin, drawn), []
            except HubError as error:
                return None, [f"whether {subject.name} was trained on these images cannot be told ({error})"]

        trained, told = from_main(accelerator, look)
        data.notes += told
        if trained is not None and trained != config.seed:
            data = main_first(accelerator, partial(load, held_out_seed=trained))
            data.notes.append(
                f"the images are those that training with seed {trained} left out; the others were trained on"
            )
    notes, split = list(data.notes), data.split
    names = data.class_names
    if subject.backbone is not None:
        backbone = subject.backbone
        match = match_labels(
            names, data.num_classes, backbone.label_names, backbone.num_classes, mode=config.label_match, new_head=False
        )
        split.label_map = match.order
        notes += [match.note] if match.note else []
        names = backbone.label_names or names
    if subject.preprocessing is not None:
        transform = eval_transform(subject.preprocessing)
    elif config.image_size is not None:
        side = config.image_size
        transform = eval_transform(Preprocessing((side, side), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))
    else:
        transform = to_tensor  # images as they are; the loader says so if their sizes differ
    made = split_images(split, transform, dataset_name(data.dataset_id), names)
    made.revision, made.num_classes = data.revision, data.num_classes
    made.notes += notes
    return made


def split_images(split: ImageSplit, transform: Transform, dataset: str, names: list[str] | None) -> EvalImages:
    """A map-style split through ``transform``; ``names``: of the model's outputs."""
    rows = split.row_array()
    digest = hashlib.sha256(np.asarray(split.label_array()).tobytes() + rows.tobytes()).hexdigest()
    return EvalImages(RowImages(ImageDataset(split, transform), rows), dataset, split.name, names, None, digest, [])


class RowImages(Dataset[dict[str, Any]]):
    """The same images, whose "index" is the row in the split on disk rather than the place among those chosen."""

    def __init__(self, images: ImageDataset, rows: np.ndarray) -> None:
        self.images, self.rows = images, rows

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int, /) -> dict[str, Any]:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: list[int]) -> list[dict[str, Any]]:
        found = self.images.__getitems__(positions)
        return [item | {"index": int(self.rows[place])} for item, place in zip(found, positions, strict=True)]


def sample_digest(images: Images, most: int = 32) -> str:
    """SHA-256 of some of the images, evenly spaced, as the model gets them: to tell other pixels under the same names
    and labels without reading them all."""
    digest = hashlib.sha256()
    for position in np.linspace(0, len(images) - 1, min(most, len(images)), dtype=int):
        pixels = torch.as_tensor(images[int(position)]["pixels"])
        digest.update(pixels.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tensor_images(pair: TensorPair, name: str) -> EvalImages:
    """Images given as (pixels, labels), see `TensorImages`."""
    images = TensorImages(*pair)
    digest = hashlib.sha256(images.pixels.contiguous().view(torch.uint8).numpy().tobytes())
    digest.update(images.labels.numpy().tobytes())
    return EvalImages(images, name, "given", None, None, digest.hexdigest(), [])


def find_teacher(subject: Subject) -> str | None:
    """The standard network that a model written by `arrest-finetune` came from, as far as the files beside it tell.

    Raises:
        HubError: they are on the Hub and cannot be fetched. BackboneError: they are damaged.
    """
    if subject.backbone is None or (record := companion_file(subject.backbone.source, RECORD)) is None:
        return None
    results = companion_file(subject.backbone.source, "results.json")
    try:
        recorded = read_results(results).model.get("teacher") if results else None
    except ValueError as error:
        raise BackboneError(str(error)) from error
    if subject.backbone.source.hub_id is not None or recorded:
        return str(recorded) if recorded else None
    record = record.resolve()  # the folder may have been given as "."
    run = record.parent.parent
    if (run / "teacher" / "config.json").is_file():
        return str(run / "teacher")
    if record.parent.name != "export" or not (run / "config.yaml").is_file():  # the folder was moved from its run
        return None
    try:
        training = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        model = None if training.get("standard_epochs") else str(training["model"])
    except (yaml.YAMLError, AttributeError, KeyError, UnicodeDecodeError):  # somebody else's
        return None
    if model is not None and not Path(model).expanduser().is_dir():  # one on the Hub would have been recorded
        raise BackboneError(f"the network that it was finetuned from, {model}, is not there: name it with --teacher")
    return model


def load_teacher(
    config: EvalConfig, subject: Subject, num_classes: int, accelerator: Accelerator, notes: list[str]
) -> Subject | None:
    """The network that --teacher names or the model's folder tells of; None, with a note, where there is none.

    Raises:
        ConfigError, BackboneError, HubError: --teacher names one that cannot be used.
    """
    named = config.teacher not in (None, "auto")
    teacher_id = config.teacher if named else None

    def look() -> tuple[str | None, list[str]]:  # in one process: another node's disk may hold less of the run
        try:
            return find_teacher(subject), []
        except ArrestError as error:
            return None, [f"no teacher: what lies beside {subject.name} cannot be read ({error})"]

    if config.teacher == "auto":
        teacher_id, told = from_main(accelerator, look)
        notes += told
    if teacher_id is None:
        return None
    size = None if subject.preprocessing is None else subject.preprocessing.size[0]
    load = partial(load_backbone, teacher_id, image_size=size, allow_pickle=config.allow_pickle)
    try:
        backbone = main_first(accelerator, load)
        if not backbone.source.pretrained:
            raise ConfigError(f"--teacher {teacher_id} is an architecture without weights: give a trained network.")
        if backbone.num_classes != num_classes:
            raise ConfigError(
                f"--teacher {teacher_id} has {backbone.num_classes} outputs and the model {num_classes}: give the "
                "network that the model was finetuned from, or none."
            )
        names = subject.backbone.label_names if subject.backbone else None
        other = backbone.label_names
        if names and other and names != other and sorted(names) == sorted(other):
            raise ConfigError(
                f"--teacher {teacher_id} has the model's classes in another order: it would be taken for wrong where "
                "it is right. Give the network that the model was finetuned from, or none."
            )
    except ArrestError as error:
        if named:
            raise
        notes.append(f"no teacher: {teacher_id!r}, which the model came from, cannot be used ({error})")
        return None
    info = _module_info(backbone, teacher_id)
    return Subject(backbone, teacher_id, info, backbone.preprocessing, backbone.source.pinned_id)


def find_folding(subject: Subject, images: EvalImages) -> None:
    """Which BatchNorm can be folded into which convolution (``subject.pairs``), by a look at one image.

    Raises:
        ConfigError: the network cannot be copied, or not be run on a CPU.
    """
    image = torch.as_tensor(images.images[0]["pixels"])
    try:
        subject.pairs = foldable(subject.module, to_pixels(torch.stack([image, image.flip(-1)])))
    except Exception as error:  # of somebody's network anything
        raise ConfigError(
            f"--fold-batchnorm: what of {subject.name} can be folded cannot be found out ({type(error).__name__}: "
            f"{error}): leave it out."
        ) from error


def count_classes(subject: Subject, images: EvalImages, accelerator: Accelerator, *, gradients: bool = True) -> int:
    """The model's number of outputs; of a network given as an object by a look at one image, which also tells whether
    its logits have gradients to the pixels (``subject.gradients``).

    ``gradients``: whether its attacks need them.

    Raises:
        ConfigError: it fails on an image, does not return logits or gives no gradients, or takes colour images and
            these are of other channels.
    """
    if subject.backbone is not None:
        if isinstance(images.images, TensorImages):
            _check_shape(images.images.pixels.shape, subject)
        return subject.backbone.num_classes
    pixels = torch.as_tensor(images.images[0]["pixels"]).to(accelerator.device)[None]
    # a copy: a network may normalise in place
    pixels = to_pixels(pixels) if pixels.dtype == torch.uint8 else pixels.clone()
    module = subject.module.to(accelerator.device)
    with frozen_eval(module):
        try:
            logits = as_logits(module(pixels.requires_grad_(gradients)))
            if not gradients:
                subject.gradients = _gives_gradients(module, pixels)
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise ConfigError(
                f"{subject.name} fails on an image of shape {tuple(pixels.shape)}, float32 in [0, 1]: "
                f"{first_line(error)}"
            ) from error
    if gradients and not logits.requires_grad:
        raise ConfigError(
            f"{subject.name} gives logits without a gradient to the pixels (a detach, no_grad or a step outside of "
            'torch), which these attacks need: give the network without it, or attacks="clean,noise,square".'
        )
    return logits.shape[1]


def _gives_gradients(module: nn.Module, pixels: Tensor) -> bool:
    pixels = pixels.clone().requires_grad_()
    try:
        (gradient,) = torch.autograd.grad(as_logits(module(pixels)).sum(), pixels, allow_unused=True)
    except RuntimeError:  # there is none, or what it does in place cannot be followed
        return False
    return gradient is not None


def _check_shape(shape: Sequence[int], subject: Subject) -> None:
    _, channels, *size = shape
    if channels != 3:  # its normalisation would make three of one, and an attack could change but that one
        raise ConfigError(f"images of {channels} channels: {subject.name} takes RGB ones. Give pixels [N, 3, H, W].")
    wanted = list(subject.preprocessing.size) if subject.preprocessing else size
    if size != wanted:
        raise ConfigError(
            f"images of {size[0]}x{size[1]} pixels: {subject.name} takes {wanted[0]}x{wanted[1]}. Resize them, or load "
            "the network for their size (image_size=...)."
        )


def preprocessing_facts(subject: Subject) -> dict[str, Any]:
    """Size, crop, mean and so on, for `results.json`; empty for a network given as an object."""
    return {} if subject.preprocessing is None else dataclasses.asdict(subject.preprocessing)
