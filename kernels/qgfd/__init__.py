"""QGFD attention: reference, native and Triton kernels side by side."""
