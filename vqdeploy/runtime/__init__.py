"""onnxruntime: sessions on the device that was asked for, and the inspection before it."""
