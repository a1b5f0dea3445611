"""What every command runs in: its errors are printed as one line. Nothing but fastdiff itself is imported for it."""

import functools
import os
import sys
import warnings
from argparse import ArgumentError  # jsonargparse raises the same
from collections.abc import Callable, Sequence
from typing import NoReturn

from fastdiff.errors import BackendError, TrainingError, one_line, package_advice

# What a user can cause; anything else keeps its traceback, since it is a fault of ours.
_USER_ERRORS = (
    ValueError,
    TypeError,
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
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
        if getattr(sys.stdout, "errors", None) == "strict":  # a terminal of few characters ends no command
            sys.stdout.reconfigure(errors="backslashreplace")
        if os.environ.get("FASTDIFF_TRACEBACK") == "1":
            return main(argv)
        format_of_before = warnings.formatwarning
        warnings.formatwarning = lambda message, *_, **__: f"{one_line(message)}\n"  # without the line of our source
        try:
            main(argv)
            sys.stdout.flush()  # here, where an error of it is caught
        except BrokenPipeError:  # who read the output has gone, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(1) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise SystemExit(130) from None
        except (TrainingError, BackendError) as error:
            fail(error, 1)
        except ArgumentError as error:
            fail(f"{one_line(error)}; --help lists what there is", 2)
        except ModuleNotFoundError as error:
            fail(package_advice(error) or error, 2)
        except _USER_ERRORS as error:
            fail(error, 2)
        except OSError as error:
            if error.filename is None:  # not about a file of the user's
                raise
            fail(f"{error.filename}: {error.strerror}", 2)
        finally:
            warnings.formatwarning = format_of_before

    return wrapper
