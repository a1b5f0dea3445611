"""bias_activation: bias and activation of an MLP in one pass, reference and Triton kernels."""
