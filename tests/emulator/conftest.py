"""Emulator libraries, built once a session into build/emulator and reused while up to date."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from build_emulator import Unavailable, build

from emulator import Emulator


def build_or_skip(variant: str) -> Path:
    try:
        return build(variant)
    except Unavailable as reason:
        pytest.skip(f"NOT TESTED: the CUDA kernels in the emulator ({variant}): {reason}")


@pytest.fixture(scope="session")
def libraries() -> Callable[[str], Path]:
    """The path of a variant, or the test is skipped with the reason."""
    return build_or_skip


@pytest.fixture(scope="session")
def shared_emulator() -> Emulator:
    # sanitized runs of these tests (build_emulator.sanitized_tests) name the library built for them
    return Emulator(Path(os.environ.get("FASTDIFF_EMULATOR") or build_or_skip("plain")))


@pytest.fixture
def emulator(shared_emulator: Emulator) -> Emulator:
    shared_emulator.configure()
    return shared_emulator
