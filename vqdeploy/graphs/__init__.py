"""Builds the ONNX graphs of a bundle: the third interpreter of the rows."""
