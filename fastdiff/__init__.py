"""fastdiff: the operators of diffusion transformers and masked diffusion language models, made fast."""

import torch as _torch

from fastdiff.version import __version__

_MINIMUM_TORCH = (2, 13)
if tuple(int(part) for part in _torch.__version__.split("+")[0].split(".")[:2]) < _MINIMUM_TORCH:
    raise ImportError(
        f"fastdiff {__version__} needs torch >= {_MINIMUM_TORCH[0]}.{_MINIMUM_TORCH[1]} and found "
        f"{_torch.__version__}; run: pip install 'torch>={_MINIMUM_TORCH[0]}.{_MINIMUM_TORCH[1]}'"
    )

from fastdiff import ops  # noqa: E402  (the version check above must come first)
from fastdiff.backends import BackendError, use_backend  # noqa: E402

__all__ = ["BackendError", "ops", "use_backend", "__version__"]
