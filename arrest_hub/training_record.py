"""Where an exported model comes from and how it was trained: `training_record.json`, written and read here alone.

It may be published, so it holds no path of the machine: a local folder is called by its name. No torch.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arrest_hub.files import write_whole
from arrest_hub.licenses import License

FORMAT_VERSION = 1
FILE_NAME = "training_record.json"


@dataclass
class BaseModel:
    """The standardly pretrained network that was finetuned.

    ``id`` and ``revision`` (a commit) are set for a model on the Hub; ``name`` is what to call it: the id, or a
    folder's name. ``license`` and ``citations`` (BibTeX entries) are what its own card states; None and empty if it
    states none.
    """

    name: str
    library: str
    architecture: str
    id: str | None = None
    revision: str | None = None
    license: License | None = None
    citations: list[str] = field(default_factory=list)


@dataclass
class TrainingData:
    """The images it was trained on. ``name`` is the id as typed, or a folder's name; ``hub_id`` and ``revision`` (a
    commit) are set for a dataset on the Hub; ``num_examples`` is None for a stream of unknown length. ``validation`` is
    the split that weights were chosen on; None if there was none, or in a record of an earlier version. ``drawn_from``
    tells the split that test images were held out of, see `subsets.ImageSplit`; None if none were."""

    name: str
    split: str
    num_classes: int
    num_examples: int | None = None
    hub_id: str | None = None
    revision: str | None = None
    validation: str | None = None
    drawn_from: str | None = None

    @property
    def chosen_on(self) -> str | None:
        """The split of the dataset's own that weights were chosen on; None if that is not known, or was held out."""
        if self.validation is None or "[held-out " in self.validation:
            return None
        return self.validation.partition("[")[0]


@dataclass
class TrainingRecord:
    """The facts of a finished run that its configuration does not tell.

    ``base`` is None where training began from a random initialisation. ``command`` repeats the run, for who has its
    inputs. ``exported_step`` is the step whose weights were chosen. ``seconds`` is the wall-clock time of training,
    validation and checkpoints, all processes side by side, over every resumption. ``earlier``: how the batches were
    dealt out before the run went on otherwise, which ``command`` and ``processes`` do not tell.
    """

    base: BaseModel | None
    data: TrainingData
    command: str
    steps: int
    exported_step: int
    epochs: float
    seconds: float
    processes: int
    hardware: str
    versions: dict[str, str]
    earlier: list[str] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write the record, whole or not at all."""
        data = {"format": FORMAT_VERSION, **dataclasses.asdict(self)}
        write_whole(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def read_record(path: Path) -> TrainingRecord:
    """Read a `training_record.json`.

    Raises:
        ValueError: not a record of a format this version knows, or one that lacks something.
    """
    data: Any = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict) or data.pop("format", None) != FORMAT_VERSION:
        raise ValueError(f"{path} is not a training record of format {FORMAT_VERSION}")
    try:
        base = data.pop("base")
        if base is not None:
            stated = base.pop("license")
            base = BaseModel(**base, license=None if stated is None else License(**stated))
        return TrainingRecord(base=base, data=TrainingData(**data.pop("data")), **data)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is a damaged training record: {type(error).__name__} {error}") from error
