"""The oracle: VQ models in plain NumPy and float64, written to be read beside the equations."""

from vqref.likelihoods import mean as reconstruct
from vqref.likelihoods import nats
from vqref.losses import Losses, compute_losses
from vqref.model import Forward, forward, init_params
from vqref.network import decode, encode
from vqref.quantizer import EMAState, Quantized, draw_indices, quantize, reset_codes, update_ema
from vqref.spec import Layer, ModelSpec, Parameter

__all__ = [
    "EMAState",
    "Forward",
    "Layer",
    "Losses",
    "ModelSpec",
    "Parameter",
    "Quantized",
    "compute_losses",
    "decode",
    "draw_indices",
    "encode",
    "forward",
    "init_params",
    "nats",
    "quantize",
    "reconstruct",
    "reset_codes",
    "update_ema",
]
