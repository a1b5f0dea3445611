"""Settings of the whole suite: poisoned memory, and nothing written outside temporary folders."""

import os

# Outputs of native operators start as NaN, so that what a kernel forgets to write is seen. Read at import.
os.environ.setdefault("FASTDIFF_POISON_EMPTY", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
