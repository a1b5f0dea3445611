"""fastdiff: the operators of diffusion transformers and masked diffusion language models, made fast."""

import importlib as _importlib
import importlib.metadata as _importlib_metadata
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
        "(. .venv/bin/activate), or run pip install 'torch>=2.10'",
        name=__name__,
    )

_MINIMUM_TORCH = (2, 10)
_torch = _sys.modules.get("torch")  # not imported here: `fastdiff --help` need not wait for it
try:
    _version = _importlib_metadata.version("torch") if _torch is None else _torch.__version__
except _importlib_metadata.PackageNotFoundError:  # a build of one's own that was not installed
    _version = _importlib.import_module("torch").__version__
if tuple(int(part) for part in _version.split("+")[0].split(".")[:2]) < _MINIMUM_TORCH:
    raise ImportError(
        f"fastdiff {__version__} needs torch >= {_MINIMUM_TORCH[0]}.{_MINIMUM_TORCH[1]} and found {_version}; run: pip "
        f"install 'torch>={_MINIMUM_TORCH[0]}.{_MINIMUM_TORCH[1]}'",
        name=__name__,
    )

__all__ = ["BackendError", "load", "ops", "use_backend", "__version__"]

_HOMES = {"BackendError": "fastdiff.backends", "load": "fastdiff.tasks.kinds", "use_backend": "fastdiff.backends"}


def __getattr__(name: str):
    """Imports what is asked for, torch with it."""
    if name in ("ops", "backends"):
        return _importlib.import_module(f"fastdiff.{name}")
    if name in _HOMES:
        _importlib.import_module("fastdiff.ops")  # whose operators `torch.ops` then has
        return getattr(_importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
