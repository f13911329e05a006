"""What the parts of a run share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator

from arrest_hub.backbones import Backbone
from arrest_hub.config import FinetuneConfig
from arrest_hub.corrupt import CorruptImages
from arrest_hub.data import Splits
from arrest_hub.progress import Log
from arrest_hub.run_folder import RunPaths
from arrest_hub.sharding import WholeCopy


@dataclass
class Run:
    """One run in one process: its configuration, folder, data and log, and what was told of it so far."""

    config: FinetuneConfig
    paths: RunPaths
    accelerator: Accelerator
    splits: Splits
    log: Log
    num_workers: int
    model_origin: str | None = None
    dataset_origin: str | None = None
    images_at_once: int | None = None
    images_logged: int = 0
    validation_loader: Any = None
    twin: WholeCopy | None = None
    corrupt: CorruptImages | None = None
    corrupt_told: set[str] = dataclasses.field(default_factory=set)

    def whole(self, network: Backbone) -> Backbone | None:
        """The network to write, in the main process; None in the others. Every process must call it."""
        if self.twin is not None:
            return self.twin.take(network)
        return network if self.accelerator.is_main_process else None
