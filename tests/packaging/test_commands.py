"""The command `fastdiff`: it lists the commands, runs each of them, and names the nearest one to a wrong name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastdiff.__main__ import COMMANDS, main
from fastdiff.version import __version__

PACKAGE = Path(__file__).resolve().parents[2] / "fastdiff"


def test_every_command_is_listed():
    with_a_main = {path.stem for path in PACKAGE.glob("*.py") if "\n@command\ndef main(" in path.read_text()}
    assert set(COMMANDS) == with_a_main


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_has_a_line_for_each(arguments, capsys):
    main(arguments)
    lines = capsys.readouterr().out.splitlines()
    for name, about in COMMANDS.items():
        assert any(line.split() == [name, *about.split()] for line in lines)


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"fastdiff {__version__}\n"


@pytest.mark.parametrize("given, advice", [("trian", "did you mean train?"), ("xyz", "fastdiff --help")])
def test_an_unknown_command(given, advice, capsys):
    with pytest.raises(SystemExit) as exit:
        main([given])
    (line,) = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and line.startswith(f"error: command: got '{given}'; expected train, ")
    assert advice in line


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_calls_itself_as_it_was_called(name, capsys):
    program = sys.argv[0]
    with pytest.raises(SystemExit) as exit:
        main([name, "--help"])
    assert exit.value.code == 0 and sys.argv[0] == program
    assert capsys.readouterr().out.split("\n")[0].startswith(f"usage: fastdiff {name}")


def test_a_module_calls_itself_as_it_was_called():
    done = subprocess.run([sys.executable, "-m", "fastdiff.info", "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: fastdiff info")


def test_the_package_is_the_command():
    done = subprocess.run([sys.executable, "-m", "fastdiff", "info"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"fastdiff {__version__} on Python")


def test_the_list_of_commands_needs_no_torch():
    code = """
import sys
from fastdiff.__main__ import main
main(["--help"])
main(["--version"])
assert "torch" not in sys.modules and "numpy" not in sys.modules
import fastdiff
assert fastdiff.ops.adaln and "torch" in sys.modules  # imported when it is asked for
assert fastdiff.use_backend and fastdiff.backends.requested() == "auto" and fastdiff.load
"""
    env = {name: value for name, value in os.environ.items() if name != "FASTDIFF_BACKEND"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
