"""The trainer: the VQ-VAE of the post in PyTorch, checked against the oracle as it runs."""

from vqtrain.model import VQVAE, Forward
from vqtrain.options import RECIPES, TrainingOptions
from vqtrain.train import Trainer, evaluate, training_step

__all__ = ["RECIPES", "VQVAE", "Forward", "Trainer", "TrainingOptions", "evaluate", "training_step"]
