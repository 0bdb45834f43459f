"""Inspects graphs, and runs them in onnxruntime on the chosen device."""
