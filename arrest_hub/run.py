"""What the parts of a run share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from arrest_hub.backbones import Backbone
from arrest_hub.config import FinetuneConfig
from arrest_hub.corrupt import CorruptImages
from arrest_hub.data import Splits
from arrest_hub.errors import ArrestError
from arrest_hub.export import write_model_folder
from arrest_hub.processes import main_only
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

    def write(self, network: Backbone, folder: Path) -> None:
        """Write the whole network to ``folder``, in the main process. Every process must call it.

        Raises:
            ArrestError: it cannot be written, as on a full disk; AlreadyReported in the other processes.
        """
        whole = self.whole(network)

        def write() -> None:
            assert whole is not None  # in the main process
            try:
                write_model_folder(whole, folder)
            except OSError as error:
                raise ArrestError(
                    f"the weights {folder} cannot be written: {error}. Make room for them, then go on with the same "
                    "command and --resume."
                ) from error

        main_only(self.accelerator, write)
