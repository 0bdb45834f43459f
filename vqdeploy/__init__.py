"""The deployment: bundles of ONNX graphs that prove themselves, and the Codec that runs them."""

from vqdeploy.codec import Codec

__all__ = ["Codec"]
