"""What the commands share: options, and errors as one line."""

import dataclasses
import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn

from jsonargparse import ArgumentError

from fastdiff.errors import TrainingError, one_line
from fastdiff.recipes import ArgumentParser

# What a user can cause; anything else keeps its traceback, since it is a fault of ours.
_USER_ERRORS = (
    ValueError,
    TypeError,
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
    ModuleNotFoundError,
)


def fail(message: object, code: int) -> NoReturn:
    """Prints an error as one line and ends the process."""
    print(f"error: {one_line(message)}", file=sys.stderr)
    raise SystemExit(code)


def command(main: Callable[[Sequence[str] | None], None]) -> Callable[[Sequence[str] | None], None]:
    """Makes a command of a function: its errors are printed as one line.

    Exit codes: 2 for what the user can mend (arguments, files, folders), 1 for a run that failed on its way.
    FASTDIFF_TRACEBACK=1 shows where an error comes from.
    """

    @functools.wraps(main)
    def wrapper(argv: Sequence[str] | None = None) -> None:
        from fastdiff.backends import BackendError

        if os.environ.get("FASTDIFF_TRACEBACK") == "1":
            return main(argv)
        try:
            return main(argv)
        except (TrainingError, BackendError) as error:
            fail(error, 1)
        except ArgumentError as error:
            fail(f"{one_line(error)}; --help lists what there is", 2)
        except _USER_ERRORS as error:
            fail(error, 2)
        except OSError as error:
            if error.filename is None:  # not about a file of the user's
                raise
            fail(f"{error.filename}: {error.strerror}", 2)

    return wrapper


def run_parser(command_name: str, description: str) -> ArgumentParser:
    """A parser for a command on a run: the run and how to sample from it; None is what the run's recipe says."""
    parser = ArgumentParser(
        prog=f"python -m fastdiff.{command_name}", description=description, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("run", type=str, help="a run's folder (the newest checkpoint), or one of its checkpoints")
    parser.add_argument("--guidance-scale", type=float | None, help="classifier-free guidance; 1 is none")
    parser.add_argument("--num-inference-steps", type=int | None, help="denoising steps")
    parser.add_argument("--sampler", type=str | None, help="euler, ddpm, ddim, dpm-solver++ or renoise")
    parser.add_argument("--seed", type=int | None, help="of the first sample; sample i has seed + i")
    parser.add_argument("--weights", type=Literal["ema", "model"], default="ema", help="averaged or plain weights")
    parser.add_argument("--device", type=str | None, help="for example cpu or cuda")
    return parser


def sampling_options(arguments: Any, defaults: Any) -> Any:
    """The run's SamplingConfig with what the command line says otherwise."""
    names = ("guidance_scale", "num_inference_steps", "sampler", "seed")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return dataclasses.replace(defaults, **given)


def quiet_libraries() -> None:
    """Silences what libraries imported so far say that a user of a command can do nothing about."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*OMP_NUM_THREADS.*")
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()  # remarks on the type of our models
        transformers_logging.disable_progress_bar()  # its bars of one shard would break the lines of ours
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # each try to reach the hub
