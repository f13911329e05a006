"""arrest-hub: make any pretrained image classifier robust to adversarial examples while keeping its clean accuracy.

The public names are loaded on first use, so that `arrest-finetune --help` does not wait for torch. The CIFAR
architectures are in timm's registry once `arrest_hub.architectures` is imported, as by every name that loads a model.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from arrest_hub.config import FinetuneConfig
from arrest_hub.errors import ArrestError, BackboneError, ConfigError, DataError, HubError

if TYPE_CHECKING:
    from arrest_hub.backbones import load_backbone
    from arrest_hub.config_sources import recipe_config
    from arrest_hub.evaluation import evaluate
    from arrest_hub.finish import RunDir
    from arrest_hub.hub import push
    from arrest_hub.hub_repository import Pushed
    from arrest_hub.hub_search import PublishedModel, list_models
    from arrest_hub.pretrained import PretrainedClassifier, from_pretrained, load
    from arrest_hub.results import EvalReport
    from arrest_hub.train import dry_run, finetune

__version__ = "0.1.0"
__all__ = [
    "ArrestError",
    "BackboneError",
    "ConfigError",
    "DataError",
    "EvalReport",
    "FinetuneConfig",
    "HubError",
    "PretrainedClassifier",
    "PublishedModel",
    "Pushed",
    "RunDir",
    "dry_run",
    "evaluate",
    "finetune",
    "from_pretrained",
    "list_models",
    "load",
    "load_backbone",
    "push",
    "recipe_config",
]
_LAZY = {
    "dry_run": "train",
    "evaluate": "evaluation",
    "finetune": "train",
    "from_pretrained": "pretrained",
    "list_models": "hub_search",
    "load": "pretrained",
    "load_backbone": "backbones",
    "EvalReport": "results",
    "RunDir": "finish",
    "PretrainedClassifier": "pretrained",
    "PublishedModel": "hub_search",
    "Pushed": "hub_repository",
    "push": "hub",
    "recipe_config": "config_sources",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"arrest_hub.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'arrest_hub' has no attribute {name!r}")
