"""`arrest_hub.load`, or `from_pretrained`: a published model as one module, and what is known about it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from torch import Tensor, nn

from arrest_hub.attacks import modes_kept
from arrest_hub.backbones import Backbone, ModelSource, load_backbone
from arrest_hub.data import to_pixels
from arrest_hub.errors import BackboneError, HashMismatch, HubError
from arrest_hub.export import weights_digest
from arrest_hub.images import upright_rgb
from arrest_hub.model_source import companion_file
from arrest_hub.results import EvalReport, read_results
from arrest_hub.training_record import FILE_NAME as RECORD
from arrest_hub.training_record import TrainingRecord, read_record
from arrest_hub.transforms import Preprocessing, eval_transform


@dataclass(frozen=True)
class PublishedThreat:
    """The perturbations that a model was trained to withstand: ``norm`` "linf" or "l2", ``eps`` the radius as a
    fraction such as "8/255", on pixels in [0, 1]."""

    norm: str
    eps: str


class PretrainedClassifier(nn.Module):
    """Pixels in [0, 1], [B, 3, H, W] -> logits [B, num_classes]; the normalisation is inside.

    ``threat_model``, ``results`` and ``record`` are None for a model that arrest-hub did not make. ``backbone`` gives
    the representation beside the logits.
    """

    def __init__(
        self,
        backbone: Backbone,
        threat_model: PublishedThreat | None = None,
        results: EvalReport | None = None,
        record: TrainingRecord | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.threat_model = threat_model
        self.results = results
        self.record = record

    @property
    def source(self) -> ModelSource:
        """Where it came from: id, commit, library, architecture."""
        return self.backbone.source

    @property
    def label_names(self) -> list[str] | None:
        """The classes in the order of the logits; None if they have no names."""
        return self.backbone.label_names

    @property
    def preprocessing(self) -> Preprocessing:
        """The size, crop and interpolation that images are brought to."""
        return self.backbone.preprocessing

    def forward(self, pixels: Tensor) -> Tensor:
        """Float images [B, 3, H, W] in [0, 1] -> logits [B, num_classes]."""
        return self.backbone(pixels).logits

    def preprocess(self, images: Image.Image | Sequence[Image.Image]) -> Tensor:
        """PIL images of any size and mode -> pixels in [0, 1], [B, 3, H, W] on the model's device and in its precision,
        as in an evaluation.

        Raises ImageError for pixels whose range is unknown (floating point, 32-bit integers above 65535), and
        BackboneError for what is no PIL image.
        """
        transform = eval_transform(self.preprocessing)
        rows: Iterator[Any] = iter([images])
        if not isinstance(images, str | os.PathLike):
            with suppress(TypeError):  # one image, or something that is none
                rows = iter(images)  # type: ignore[arg-type]
        several = list(rows)
        if not several:
            raise BackboneError("there are no images: give at least one.")
        if strange := [type(image).__name__ for image in several if not isinstance(image, Image.Image)]:
            raise BackboneError(f"a {strange[0]} is no PIL image: PIL.Image.open(path) or .fromarray(array) gives one.")
        pixels = torch.stack([transform(upright_rgb(image)) for image in several])
        return to_pixels(pixels).to(self.backbone.mean)

    @torch.no_grad()
    def classify(self, image: Image.Image, top: int = 5) -> list[tuple[str, float]]:
        """The ``top`` most probable classes of one PIL image, as (name, probability); a class without a name is its
        number. In eval mode, whatever the model's. Raises BackboneError for several."""
        if not isinstance(image, Image.Image):
            raise BackboneError(f"image is a {type(image).__name__}: give one PIL image, as of PIL.Image.open(path).")
        with modes_kept(self):
            probabilities = self.eval()(self.preprocess(image))[0].softmax(0)
        best = probabilities.topk(min(top, len(probabilities)))
        names = self.label_names or [str(index) for index in range(len(probabilities))]
        return [(names[index], value) for index, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)]

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        at = f" @ {self.source.revision}" if self.source.revision else ""
        threat = f", robust to {self.threat_model.norm} {self.threat_model.eps}" if self.threat_model else ""
        return f"{self.source.model_id}{at}{threat}"


def from_pretrained(
    model_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    image_size: int | None = None,
    allow_pickle: bool = False,
    cache_dir: str | Path | None = None,
) -> PretrainedClassifier:
    """Load a model from the Hub or a folder: pixels in [0, 1] -> logits, in eval mode, float32.

    ``model_id`` is any id that `load_backbone` takes, ``revision`` a branch, tag or commit. Files are checked against
    the hashes that the Hub states; weights are safetensors unless ``allow_pickle``, and no code from a repository is
    run. Without a network, the copy in the cache serves. For a model that arrest-hub made, threat model and results
    come with it; a warning is given if the results are of other weights.

    Raises:
        BackboneError: the id names no usable classifier. HubError: the Hub cannot serve it, or a file's hash differs.
    """
    backbone = load_backbone(
        model_id, revision=revision, image_size=image_size, allow_pickle=allow_pickle, cache_dir=cache_dir
    )
    threat, results, record = _known_facts(backbone.source, cache_dir)
    if results is not None and image_size is None:
        measured = results.model.get("weights_sha256")
        if measured is not None and measured != weights_digest(backbone):
            warnings.warn(
                f"the results.json of {backbone.source.model_id} is of other weights than these", stacklevel=2
            )
    model = PretrainedClassifier(backbone, threat, results, record).eval()
    return model if device is None else model.to(device)


load = from_pretrained
"""The same function: `arrest_hub.load("someone/model")`."""


def _known_facts(
    source: ModelSource, cache_dir: str | Path | None
) -> tuple[PublishedThreat | None, EvalReport | None, TrainingRecord | None]:
    """What the files beside the weights say, if arrest-hub wrote them.

    Raises:
        BackboneError: one of them is damaged. HashMismatch: or not what the Hub states.
    """
    try:
        paths = [companion_file(source, name, cache_dir) for name in (RECORD, "results.json", "training_config.yaml")]
    except HashMismatch:
        raise
    except HubError as error:
        warnings.warn(
            f"threat model and results of {source.model_id} are not known: what lies beside its weights cannot be "
            f"fetched ({error})", stacklevel=3,
        )  # fmt: skip
        return None, None, None
    record_file, results_file, config_file = paths
    if record_file is None:  # somebody else's results.json may be anything
        return None, None, None
    try:
        record = read_record(record_file)
        results = None if results_file is None else read_results(results_file)
        training = {} if config_file is None else yaml.safe_load(config_file.read_text(encoding="utf-8"))
        threat = PublishedThreat(training["norm"], training["eps"]) if training else None
    except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise BackboneError(
            f"What is written beside the weights of {source.model_id!r} is damaged ({' '.join(str(error).split())}). "
            "Push the run again, or load the model alone with arrest_hub.load_backbone."
        ) from error
    return threat, results, record
