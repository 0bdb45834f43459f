"""The trainer: a VQ model in PyTorch, checked against the oracle as it runs.

Names are imported when they are first used, so that ``python -m vqtrain --help`` does not wait for
PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vqtrain.model import VQVAE, Forward
    from vqtrain.options import RECIPES, TrainingOptions
    from vqtrain.run.metrics import evaluate
    from vqtrain.run.step import training_step
    from vqtrain.run.trainer import Trainer

_HOMES = {
    "RECIPES": "options",
    "VQVAE": "model",
    "Forward": "model",
    "Trainer": "run.trainer",
    "TrainingOptions": "options",
    "evaluate": "run.metrics",
    "training_step": "run.step",
}
__all__ = ["RECIPES", "VQVAE", "Forward", "Trainer", "TrainingOptions", "evaluate", "training_step"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
