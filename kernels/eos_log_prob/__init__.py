"""EoS-first length: reference and kernels."""
