"""Fused AdaLN: reference, and the Triton kernels."""
