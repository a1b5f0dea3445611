"""The kernels: one folder an operator, all its backends side by side."""
