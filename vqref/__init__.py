"""The oracle: VQ models in plain NumPy and float64, to be read side by side with the equations."""

from vqref.lazy import lazy

TYPE_CHECKING = False  # type checkers take it for true; importing typing takes long
if TYPE_CHECKING:
    from vqref.likelihoods import mean as reconstruct
    from vqref.likelihoods import nats
    from vqref.losses import Losses, compute_losses
    from vqref.model import Forward, forward, gradients, init_params
    from vqref.network import decode, encode
    from vqref.quantizer import (
        EMAState,
        Quantized,
        averaged,
        draw_indices,
        quantize,
        reset_codes,
        update_ema,
    )
    from vqref.spec import Layer, ModelSpec, Parameter

__all__ = [
    "EMAState",
    "Forward",
    "Layer",
    "Losses",
    "ModelSpec",
    "Parameter",
    "Quantized",
    "averaged",
    "compute_losses",
    "decode",
    "draw_indices",
    "encode",
    "forward",
    "gradients",
    "init_params",
    "nats",
    "quantize",
    "reconstruct",
    "reset_codes",
    "update_ema",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "EMAState": "quantizer.EMAState",
        "Forward": "model.Forward",
        "Layer": "spec.Layer",
        "Losses": "losses.Losses",
        "ModelSpec": "spec.ModelSpec",
        "Parameter": "spec.Parameter",
        "Quantized": "quantizer.Quantized",
        "averaged": "quantizer.averaged",
        "compute_losses": "losses.compute_losses",
        "decode": "network.decode",
        "draw_indices": "quantizer.draw_indices",
        "encode": "network.encode",
        "forward": "model.forward",
        "gradients": "model.gradients",
        "init_params": "model.init_params",
        "nats": "likelihoods.nats",
        "quantize": "quantizer.quantize",
        "reconstruct": "likelihoods.mean",
        "reset_codes": "quantizer.reset_codes",
        "update_ema": "quantizer.update_ema",
    },
)
