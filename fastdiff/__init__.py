"""fastdiff: the operators of diffusion transformers and masked diffusion language models, made fast."""

import importlib.util as _importlib_util
import sys as _sys
from pathlib import Path as _Path

from fastdiff.version import __version__

# The errors below name the package, so that `python -m fastdiff.train` prints them as one line.
_CHECKOUT = _Path(__file__).resolve().parents[1]
if _importlib_util.find_spec("fastdiff.kernels") is None and (_CHECKOUT / "kernels" / "adaln").is_dir():
    raise ImportError(
        f"fastdiff was found in its source checkout {_CHECKOUT}, which is not installed for {_sys.executable}: enter "
        "the environment that make built (. .venv/bin/activate), or run pip install -e . here; or, where fastdiff is "
        "installed, leave this folder or use python -P",
        name=__name__,
    )
if _importlib_util.find_spec("torch") is None:
    raise ImportError(
        f"fastdiff needs torch, which {_sys.executable} does not have: enter the environment that make built "
        "(. .venv/bin/activate), or run pip install 'torch>=2.13'",
        name=__name__,
    )

import torch as _torch  # noqa: E402  (torch's own error would be longer)

_MINIMUM_TORCH = (2, 13)
if tuple(int(part) for part in _torch.__version__.split("+")[0].split(".")[:2]) < _MINIMUM_TORCH:
    raise ImportError(
        f"fastdiff {__version__} needs torch >= {_MINIMUM_TORCH[0]}.{_MINIMUM_TORCH[1]} and found "
        f"{_torch.__version__}; run: pip install 'torch>={_MINIMUM_TORCH[0]}.{_MINIMUM_TORCH[1]}'",
        name=__name__,
    )

from fastdiff import lazy as _lazy  # noqa: E402
from fastdiff import ops  # noqa: E402  (the version check above must come first)
from fastdiff.backends import BackendError, use_backend  # noqa: E402

__all__ = ["BackendError", "load", "ops", "use_backend", "__version__"]

__getattr__ = _lazy.exports(__name__, {"load": "fastdiff.tasks.kinds"})
