"""States of prompts in the cache: what comes back, kill -9, two processes at once, full disks, damaged files."""

import resource
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from fastdiff.data.text_states import TextStates, cached_text_states
from fastdiff.files import cache_folder

TEXTS = [f"{'a ' * (index % 7)}prompt {index}" for index in range(300)]  # three parts
SLOW = """
import sys, time, torch
from pathlib import Path
from fastdiff.data.text_states import cached_text_states

def encode(texts):
    with open(sys.argv[1], "a") as log:
        log.write(f"{len(texts)}\\n")
    time.sleep(float(sys.argv[2]))
    return [torch.full((len(text.split()), 2, 3), float(text.split()[-1])) for text in texts]

texts = [f"{'a ' * (index % 7)}prompt {index}" for index in range(300)]
cached_text_states(texts, encode, "key", progress=False)
print("done")
"""


def encode(texts):
    """A row a word; the numbers tell the prompt and the word."""
    return [torch.stack([torch.full((2, 3), int(text.split()[-1]) + word / 4) for word in range(len(text.split()))])
            for text in texts]  # fmt: skip


def states_of(texts=TEXTS, function=encode, key="key"):
    return cached_text_states(texts, function, key, progress=False)


def none(texts):
    raise AssertionError(f"{len(texts)} prompts were computed again")


def test_states_come_back(cache):
    states = states_of()
    assert len(states) == 300 and (states.num_states, states.hidden_size) == (2, 3) and states.dtype == torch.float16
    assert not list(cache.rglob("*.parts"))
    wanted = encode(TEXTS)
    assert all(torch.equal(states.states(index), wanted[index]) for index in range(300))
    assert states.lengths.tolist() == [len(each) for each in wanted]
    assert len(states_of(function=none)) == 300  # from the cache
    for other in (dict(key="other"), dict(texts=TEXTS[:200])):
        with pytest.raises(AssertionError, match="computed again"):
            states_of(**{"function": none} | other)


@pytest.mark.parametrize("num_states", [1, 2])
def test_batches_are_padded_behind(cache, num_states):
    states = states_of(function=lambda texts: [each[:, :num_states] for each in encode(texts)])
    batch = states.batch(torch.tensor([6, 0, 6, 13]))
    assert batch["text_states"].dtype == torch.float32 and batch["text_mask"].dtype == torch.bool
    assert batch["text_states"].shape == ((4, 8, 3) if num_states == 1 else (4, 8, 2, 3))
    assert batch["text_mask"].sum(1).tolist() == [8, 2, 8, 8]
    flat = batch["text_states"].reshape(4, 8, -1)
    assert torch.equal(flat[1, :2], encode(TEXTS[:1])[0][:, :num_states].reshape(2, -1))
    assert not flat[1, 2:].any()
    padded = TextStates.pad([states.states(index) for index in (6, 0, 6, 13)])
    assert all(torch.equal(padded[name], batch[name]) for name in batch)


def test_values_beyond_float16_are_kept_in_float32(cache):
    def large(texts):
        return [each * (1e5 if "prompt 299" in text else 1) for text, each in zip(texts, encode(texts), strict=True)]

    states = states_of(function=large)
    assert states.dtype == torch.float32 and torch.equal(states.states(299), large(TEXTS[299:])[0])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda texts: encode(texts)[1:], "encode: got 127 states .* for 128 prompts"),
        (lambda texts: [each[0] for each in encode(texts)], r"encode: got 128 states .*expected \[s, K, C\] for each"),
        (lambda texts: [each[:0] for each in encode(texts)], "s >= 1"),
        (lambda texts: [each / 0 for each in encode(texts)], "encode: got states of 'prompt 0' that are not finite"),
        (lambda texts: [each[..., : 1 + ("a" in texts[0])] for each in encode(texts)], "one shape for all prompts"),
    ],
)
def test_states_that_do_not_fit_are_refused(cache, function, message):
    with pytest.raises(ValueError, match=message):
        states_of(function=function)


def test_indices_and_lists_that_cannot_be(cache):
    states = states_of()
    for index in (-1, 300):
        with pytest.raises(IndexError, match=rf"indices: got {index}; expected 0 … 299"):
            states.batch([0, index])
    with pytest.raises(ValueError, match="indices: got none"):
        states.batch([])
    with pytest.raises(ValueError, match=r"states: got 2 of shapes \[\[2, 1, 3\], \[2, 2, 3\]\]; expected one or more"):
        TextStates.pad([torch.zeros(2, 1, 3), torch.zeros(2, 2, 3)])
    with pytest.raises(ValueError, match="texts: got none"):
        states_of([])


def start(log, seconds):
    command = [sys.executable, "-c", SLOW, str(log), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_killed_process_loses_one_part_at_most(cache, tmp_path):
    log = tmp_path / "log"
    process = start(log, 0.5)
    while not log.exists() or len(log.read_text().split()) < 2:  # the first part is written, the second under way
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    counts = []

    def counted(texts):
        counts.append(len(texts))
        return encode(texts)

    states = states_of(function=counted)
    assert counts == [128, 44]
    found = [states.states(index)[0, 0, 0].item() for index in range(300)]
    assert found == list(range(300))  # those of the killed process, too


def test_two_processes_at_once_compute_once(cache, tmp_path):
    log = tmp_path / "log"
    processes = [start(log, 0.1) for _ in range(2)]
    for process in processes:
        out, error = process.communicate(timeout=120)
        assert out == "done\n", error
    assert sorted(map(int, log.read_text().split())) == [44, 128, 128]


def test_a_part_that_was_damaged_on_the_way_is_made_again(cache):
    def stopping(texts):
        if len(texts) < 128:
            raise KeyboardInterrupt
        return encode(texts)

    with pytest.raises(KeyboardInterrupt):
        states_of(function=stopping)
    first, second = sorted(cache.rglob("part-*.bin"))
    first.write_bytes(first.read_bytes()[:-1] + b"\1")
    second.write_bytes(second.read_bytes()[:-5])
    states = states_of()
    assert all(torch.equal(states.states(i), each) for i, each in enumerate(encode(TEXTS)))


def test_a_full_disk_is_named_and_nothing_is_lost(cache):
    def wide(texts):
        return [each.repeat(1, 1, 400) for each in encode(texts)]

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    done = []

    def counted(texts):
        if done:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        done.append(len(texts))
        return wide(texts)

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(OSError, match="free some space, or set FASTDIFF_CACHE") as error:
            states_of(function=counted)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert error.value.filename == str(cache_folder() / "text_states")
    states_of(function=wide)
    assert done == [128, 128]


def damaged_at(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: damaged_at(path, -1), "part-00001.bin: its content is damaged"),
        (lambda path: damaged_at(path, 30), "part-00001.bin: its header is damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-2]), "part-00001.bin: holds .* bytes; expected"),
        (lambda path: path.write_bytes(b"x"), "part-00001.bin: does not begin as"),
        (lambda path: path.unlink(), "part-00001.bin: no such file"),
        (lambda path: path.write_bytes(path.with_name("part-00000.bin").read_bytes()), "not those of one list"),
        (lambda path: path.with_name("index.json").write_text("{}"), "index.json: not of version 1"),
        (lambda path: path.with_name("index.json").write_text("x"), "index.json: not a JSON file .*; delete"),
        (lambda path: path.with_name("index.json").unlink(), "index.json: no such file; delete the folder"),
    ],
)
def test_damaged_files_are_named(cache, damage, message):
    states_of()
    (path,) = cache.rglob("part-00001.bin")
    damage(path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        states_of(function=none)
    assert f"delete the folder {path.parent}, and it is made again" in str(error.value)


def test_threads_may_read_at_once(cache):
    states, wrong = states_of(), []
    wanted = encode(TEXTS)

    def read(first):
        batch = states.batch(range(first, first + 50))
        rows = zip(batch["text_states"], batch["text_mask"], wanted[first : first + 50], strict=True)
        wrong.extend(first for row, mask, each in rows if not torch.equal(row[mask], each))

    threads = [threading.Thread(target=read, args=(first,)) for first in range(0, 250, 50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
