"""The deployment: bundles of ONNX graphs that prove themselves, and the Codec that runs them."""

from vqref.lazy import lazy

TYPE_CHECKING = False  # as type checkers know it; typing itself takes long to import
if TYPE_CHECKING:
    from vqdeploy.codec import Codec

__all__ = ["Codec"]

__getattr__, __dir__ = lazy(__name__, {"Codec": "codec.Codec"})
