"""Deployment: bundles of ONNX graphs that can be verified, and the Codec that runs them."""

from vqref.lazy import lazy

TYPE_CHECKING = False  # type checkers know this name; importing typing takes long
if TYPE_CHECKING:
    from vqdeploy.codec import Codec

__all__ = ["Codec"]

__getattr__, __dir__ = lazy(__name__, {"Codec": "codec.Codec"})
