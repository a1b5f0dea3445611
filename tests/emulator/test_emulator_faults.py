"""Tests of the detectors: every seeded fault is caught by what is meant to catch it, and right kernels pass."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from build_emulator import preloaded, race, sanitized_tests

from emulator import SCHEDULES, Emulator, EmulatorError

HERE = Path(__file__).parent


def results(emulator: Emulator, fault: str) -> list[torch.Tensor]:
    """What a fault's kernel writes under each schedule."""
    outputs = []
    for schedule in SCHEDULES:
        emulator.configure(schedule)
        inputs, out = torch.arange(128.0), torch.zeros(128)
        emulator.fault(fault, inputs, out)
        outputs.append(out)
    return outputs


@pytest.mark.parametrize("fault", ["reverse", "reverse_copied", "dynamic_shared", "vectors", "one_cell_a_block"])
def test_right_kernels_pass(emulator, fault):
    first, *others = results(emulator, fault)
    assert all(torch.equal(first, other) for other in others)


def test_removed_barrier_makes_schedules_disagree(emulator):
    expected = torch.arange(128.0).flip(0)
    outputs = results(emulator, "removed_barrier")
    assert not all(torch.equal(out, outputs[0]) for out in outputs)
    assert all(out.isnan().any() or not torch.equal(out, expected) for out in outputs)  # poison shows as well


def test_uninitialised_shared_memory_is_nan(emulator):
    assert all(out.isnan().all() for out in results(emulator, "uninitialised_shared"))


def test_a_copy_to_shared_memory_is_nan_until_it_was_waited_for(emulator):
    assert all(out.isnan().any() for out in results(emulator, "copy_read_before_wait"))
    outputs = results(emulator, "wait_for_the_wrong_group")
    assert all(out[:64].isnan().any() and torch.equal(out[64:], torch.arange(64.0, 128.0)) for out in outputs)


def test_a_copy_to_shared_memory_needs_a_barrier_on_top(emulator):
    outputs = results(emulator, "copy_read_before_barrier")
    assert not all(torch.equal(out, outputs[0]) for out in outputs)


@pytest.mark.parametrize(
    "fault, message",
    [
        ("divergent_barrier", r"(a barrier that some threads|a thread exits while others wait).*thread\(\d+,0,0\)"),
        ("two_barriers", r"divergent barrier, others wait at .*faults\.cu:\d+: block\(0,0,0\) thread.*faults\.cu:\d+"),
        ("divergent_shuffle", r"the mask of a warp exchange names a lane that has exited|deadlock: block\(0,0,0\)"),
        ("misaligned_vector", r"misaligned access of 16 bytes: block\(0,0,0\) thread\(\d+,0,0\) .*cuda_dtype\.cuh:\d+"),
        ("misaligned_copy", r"misaligned access of 16 bytes: block\(0,0,0\) thread.* cp\.async at .*faults\.cu:\d+"),
        ("copy_without_wait", r"exits without having waited for its copies.*: block\(0,0,0\) thread\(\d+,0,0\)"),
        ("too_much_static_shared", r"shared memory: 262144 bytes a block, the limit is 49152"),
        ("too_much_dynamic_shared", r"shared memory: 102400 bytes a block, the limit is 49152"),
    ],
)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_reported_faults(emulator, fault, message, schedule):
    emulator.configure(schedule)
    with pytest.raises(EmulatorError, match=message):
        emulator.fault(fault, torch.arange(128.0), torch.zeros(128))
    emulator.fault("reverse", torch.arange(128.0), torch.zeros(128))  # the emulator goes on after a fault


def test_shared_memory_limit_is_the_chips(emulator):
    emulator.configure(shared_limit=99 << 10)  # sm_120
    with pytest.raises(EmulatorError, match="the limit is 101376"):
        emulator.fault("too_much_dynamic_shared", torch.arange(128.0), torch.zeros(128))
    emulator.configure(shared_limit=163 << 10)  # sm_80
    emulator.fault("too_much_dynamic_shared", torch.arange(128.0), torch.zeros(128))


FAULT_PROGRAM = """
import ctypes, sys
library, fault = sys.argv[1:]
lib, libc, n = ctypes.CDLL(library), ctypes.CDLL(None), 128
lib.fd_error.restype = ctypes.c_char_p
libc.aligned_alloc.restype = ctypes.c_void_p
buffers = [ctypes.c_void_p(libc.aligned_alloc(ctypes.c_size_t(64), ctypes.c_size_t(4 * n))) for _ in range(2)]
for b in buffers:
    ctypes.memset(b, 0, 4 * n)
status = lib.fd_fault(fault.encode(), *buffers, n)
print("status", status, lib.fd_error().decode())
"""


@pytest.mark.parametrize(
    "fault, report",
    [
        ("reverse", None),
        ("vectors", None),
        ("read_past_the_end", "heap-buffer-overflow"),
        ("write_past_static_shared", "index 128 out of bounds"),
        ("write_past_dynamic_shared", "AddressSanitizer"),
        ("misaligned_cast", "misaligned address"),
    ],
)
def test_sanitizers_catch(libraries, fault, report):
    command = [sys.executable, "-c", FAULT_PROGRAM, str(libraries("asan")), fault]
    done = subprocess.run(command, capture_output=True, text=True, env=preloaded())
    if report is None:
        assert done.returncode == 0 and "status 0" in done.stdout, done.stderr
    else:
        assert done.returncode != 0 and report in done.stderr, done.stdout + done.stderr
        assert "faults.cu" in done.stderr


def test_adaln_under_address_and_undefined_behaviour_sanitizers(libraries):
    """A selection of test_emulated_adaln.py, in a process of its own with the sanitized library."""
    chosen = ["widths and (1- or 7- or 384- or 8200-)", "BFD or BD", "misaligned", "segments", "empty"]
    done = sanitized_tests(str(HERE / "test_emulated_adaln.py"), chosen, libraries("asan"))
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]


def test_unmask_under_address_and_undefined_behaviour_sanitizers(libraries):
    """A selection of test_emulated_unmask.py, in a process of its own with the sanitized library."""
    chosen = "(every and (rows or blocks)) or lengths or shared or range or strided or no_rows"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "test_emulated_unmask.py")]
    environment = preloaded() | {"FASTDIFF_EMULATOR": str(libraries("asan"))}
    done = subprocess.run([*command, "-k", chosen], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("fault", ["cross_block_race", "removed_barrier", "copy_read_before_barrier"])
def test_race_check_catches(libraries, fault):
    libraries("race")
    done = race("fault", fault)
    assert done.returncode == 66, done.stderr
    assert "data race" in done.stderr and "faults.cu" in done.stderr


@pytest.mark.parametrize("fault", ["reverse", "reverse_copied", "one_cell_a_block"])
def test_race_check_passes_right_kernels(libraries, fault):
    libraries("race")
    done = race("fault", fault)
    assert done.returncode == 0, done.stderr
