"""scale_shift: the example operator, reference and Triton kernel."""
