"""The kernels: one folder per operator, all its backends side by side."""
