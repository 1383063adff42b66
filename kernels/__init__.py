"""Kernels of Attune: the tensor operations every other room computes with."""

# Another package on the public index is called `kernels`; transformers asks for its version
# when it finds the name on the path, and fails on a missing one. Zero makes it look elsewhere.
__version__ = "0.0.0"
