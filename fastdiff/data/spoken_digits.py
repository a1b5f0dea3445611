"""Digits spoken by Debian's espeak-ng: synthesised once, in several voices, and kept in the cache."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastdiff.data.waveforms import read_wav
from fastdiff.errors import named
from fastdiff.files import cache_folder, make_folder_once, read_json
from fastdiff.reading import reading

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_FORMAT = 1  # of the cached folder
_META, _SAMPLES, _LIMITS = "meta.json", "samples.npy", "limits.npy"


@dataclass(frozen=True)
class Voice:
    """How espeak-ng speaks: -v accent+speaker -p pitch (0 … 99) -s speed (words per minute)."""

    accent: str
    speaker: str
    pitch: int
    speed: int


SPEAKERS = (*(f"m{i}" for i in range(1, 9)), *(f"f{i}" for i in range(1, 6)))  # espeak-ng's own men and women
HELD_OUT_SPEAKERS = ("m5", "f4")
VOICES = tuple(
    Voice(*fields)
    for fields in product(("en-us", "en-gb", "en-gb-scotland", "en-029"), SPEAKERS, (35, 65), (190, 220, 250))
)


class Utterances(NamedTuple):
    """Spoken digits one after the other: digit i % 10 of voice i // 10 is samples[limits[i]:limits[i + 1]]."""

    rate: int  # Hz
    samples: np.ndarray  # int16, read from disk as it is asked for
    limits: np.ndarray  # int64 [10 · voices + 1]


def load_utterances(voices: tuple[Voice, ...] = VOICES) -> Utterances:
    """Every digit in every voice, from the cache, or synthesised (about a minute for all) and kept there.

    Raises:
        FileNotFoundError: espeak-ng is missing; one line with what to install.
        OSError: the cache cannot be written.
        RuntimeError: espeak-ng failed.
    """
    version = _espeak_version()
    key = json.dumps([_FORMAT, version, WORDS, [astuple(voice) for voice in voices]])
    digest = hashlib.sha256(key.encode()).hexdigest()
    folder = cache_folder() / "sounds" / f"spoken_digits-{digest[:16]}"
    if not _is_complete(folder):
        make_folder_once(folder, _is_complete, lambda new: _synthesise(new, voices, version))
    with reading(folder, " is damaged", "; delete it, and it is made again"):
        meta = read_json(folder / _META)
        samples, limits = np.load(folder / _SAMPLES, mmap_mode="r"), np.load(folder / _LIMITS)
        meta["rate"], meta["sha256"]
    if hashlib.sha256(samples.tobytes() + limits.tobytes()).hexdigest() != meta["sha256"]:
        raise ValueError(f"{folder} is damaged (its checksum differs); delete it, and it is made again")
    return Utterances(meta["rate"], samples, limits)


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in (_META, _SAMPLES, _LIMITS))


def _espeak_version() -> str:
    if shutil.which("espeak-ng") is None:
        raise FileNotFoundError(
            f"{named('name')}: got 'spoken_digits', which the program espeak-ng speaks, and it is not installed; run: "
            "apt-get install espeak-ng"
        )
    text = subprocess.run(["espeak-ng", "--version"], capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout
    found = re.search(r"\d+(\.\d+)+\S*", text)
    return found.group() if found else text.strip()


def _synthesise(folder: Path, voices: tuple[Voice, ...], version: str) -> None:
    from tqdm import tqdm

    jobs = list(product(voices, WORDS))
    print(f"speaking {len(jobs)} digits with espeak-ng {version} into {folder.parent}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(os.cpu_count()) as pool:
        spoken = pool.map(lambda job: _speak(*job, Path(temporary)), jobs)
        spoken = list(tqdm(spoken, total=len(jobs), desc="spoken_digits", unit=" words", disable=None))
    rates = {rate for rate, _ in spoken}
    if len(rates) != 1:
        raise RuntimeError(f"espeak-ng gave several sampling rates ({sorted(rates)}); expected one")
    samples = np.concatenate([samples for _, samples in spoken])
    limits = np.cumsum([0, *(len(samples) for _, samples in spoken)], dtype=np.int64)
    np.save(folder / _SAMPLES, samples)
    np.save(folder / _LIMITS, limits)
    digest = hashlib.sha256(samples.tobytes() + limits.tobytes()).hexdigest()
    (folder / _META).write_text(json.dumps({"rate": rates.pop(), "espeak": version, "sha256": digest}) + "\n")


def _speak(voice: Voice, word: str, folder: Path) -> tuple[int, np.ndarray]:
    path = folder / f"{'-'.join(map(str, astuple(voice)))}-{word}.wav"
    command = ["espeak-ng", "-v", f"{voice.accent}+{voice.speaker}", "-p", str(voice.pitch), "-s", str(voice.speed)]
    command += ["-z", "-w", str(path), word]  # -z: no pause at the end
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0 or not path.is_file():
        message = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        raise RuntimeError(f"espeak-ng could not say {word!r} as {voice} ({message}); expected Debian's espeak-ng")
    rate, waveform = read_wav(path)
    path.unlink()
    return rate, np.rint(waveform * 32768).astype(np.int16)  # exactly what was in the file
