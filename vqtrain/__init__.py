"""The trainer: a VQ model in PyTorch, checked against the oracle as it runs."""

from vqref.lazy import lazy

TYPE_CHECKING = False  # type checkers take it as True; typing itself is slow to import
if TYPE_CHECKING:
    from vqtrain.model import VQVAE, Forward
    from vqtrain.options import RECIPES, TrainingOptions
    from vqtrain.run.metrics import evaluate
    from vqtrain.run.step import training_step
    from vqtrain.run.trainer import Trainer
    from vqtrain.training import train

__all__ = [
    "RECIPES",
    "VQVAE",
    "Forward",
    "Trainer",
    "TrainingOptions",
    "evaluate",
    "train",
    "training_step",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "RECIPES": "options.RECIPES",
        "VQVAE": "model.VQVAE",
        "Forward": "model.Forward",
        "Trainer": "run.trainer.Trainer",
        "TrainingOptions": "options.TrainingOptions",
        "evaluate": "run.metrics.evaluate",
        "train": "training.train",
        "training_step": "run.step.training_step",
    },
)
