"""Sounds: reading, resampling, windows and splits; digits of espeak-ng; what is said of unusable files."""

import json
import shutil

import numpy as np
import pytest
import torch
from file_seeds import wav
from scipy.io import wavfile

from fastdiff.data import AudioDataConfig, load_audio_data
from fastdiff.data.audio import ALSA_FOLDER
from fastdiff.data.spoken_digits import Voice, load_utterances
from fastdiff.data.waveforms import read_wav, resample, trimmed
from fastdiff.models.qgfd.adapters.processors import AudioProcessor

VOICES = (Voice("en-us", "m1", 50, 250), Voice("en-gb", "f4", 50, 250), Voice("en-us", "f2", 60, 250))  # f4: held out


def tone(hertz, rate, seconds=0.1):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)


def write(path, waveform, rate):
    path.parent.mkdir(parents=True, exist_ok=True)
    wavfile.write(path, rate, np.rint(np.asarray(waveform) * 32767).astype(np.int16))
    return path


@pytest.fixture
def sounds(tmp_path):
    """Two classes, low and high; files of three rates, one in stereo."""
    for name, hertz in (("low", 400), ("high", 1500)):
        for index, rate in enumerate((8000, 16000, 44100)):
            waveform = tone(hertz, rate)
            write(tmp_path / name / f"{index}.wav", np.stack([waveform] * 2, 1) if index == 1 else waveform, rate)
    return tmp_path


def config(folder, **fields):
    defaults = dict(name="audio_folder", folder=str(folder), sampling_rate=8000, num_samples=512)
    return AudioDataConfig(**defaults | fields)


def loudest_frequency(waveform, rate):
    spectrum = np.abs(np.fft.rfft(np.asarray(waveform) * np.hanning(len(waveform))))
    return np.argmax(spectrum) * rate / len(waveform)


def test_folder_of_several_rates(sounds, capsys):
    """Sounds of other rates come out at the config's rate, at their own pitch, and one line says so."""
    data = load_audio_data(config(sounds))
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "4 sounds of 16000, 44100 Hz are resampled to 8000 Hz" in said
    assert data.class_names == ("high", "low") and (data.sampling_rate, data.num_samples) == (8000, 512)
    assert data.held_out.labels.tolist() == [0, 1] and len(data.train) == 4
    for part in (data.train, data.held_out):
        batch = part.batch(range(len(part)))
        assert batch["input_values"].shape == (len(part), 512) and batch["input_values"].dtype == torch.float32
        assert torch.equal(batch["labels"], part.labels)
        for waveform, label in zip(batch["input_values"], batch["labels"], strict=True):
            # a bin of 512 samples is 15.6 Hz wide
            assert loudest_frequency(waveform, 8000) == pytest.approx((1500, 400)[label], abs=16)
            assert 0.85 < waveform.abs().max() <= 0.9 + 1e-4
    assert data.train.batch([])["input_values"].shape == (0, 512)


def test_nothing_is_said_where_nothing_is_resampled(sounds, capsys):
    for path in sounds.rglob("*.wav"):
        if path.name != "0.wav":
            shutil.copy(path.with_name("0.wav"), path)
    load_audio_data(config(sounds))
    assert capsys.readouterr().err == ""


def test_short_sounds_are_followed_by_zeros_and_long_ones_give_several_windows(sounds):
    short = load_audio_data(config(sounds, num_samples=1000)).train
    waveforms = short.batch(range(len(short)))["input_values"]
    assert len(short) == 4 and (waveforms[:, 810:] == 0).all() and (waveforms[:, :700].abs().amax(1) > 0.8).all()
    # 0.1 s are 800 samples less what the trim takes off: three starts of 512 fit, 100 apart
    assert len(load_audio_data(config(sounds, num_samples=512, hop=100)).train) == 12


def test_fingerprint_changes_with_the_sounds(sounds):
    first = load_audio_data(config(sounds)).fingerprint
    assert load_audio_data(config(sounds)).fingerprint == first
    write(sounds / "low" / "0.wav", tone(410, 8000), 8000)
    assert load_audio_data(config(sounds)).fingerprint != first


@pytest.mark.parametrize(
    ("encode", "tolerance"),  # half a step of each format
    [
        (lambda w: np.rint(w * 127 + 128).astype(np.uint8), 1 / 128),
        (lambda w: np.rint(w * 32767).astype(np.int16), 1e-4),
        (lambda w: np.rint(w * (2**31 - 1)).astype(np.int32), 1e-8),
        (lambda w: w.astype(np.float32), 1e-7),
    ],
)
def test_formats_of_wav_files(tmp_path, encode, tolerance):
    waveform = tone(440, 8000)
    wavfile.write(tmp_path / "a.wav", 8000, encode(waveform))
    rate, read = read_wav(tmp_path / "a.wav")
    assert rate == 8000 and np.abs(read - waveform).max() <= tolerance


def test_stereo_is_averaged(tmp_path):
    left, right = tone(400, 8000), tone(900, 8000)
    _, read = read_wav(write(tmp_path / "a.wav", np.stack([left, right], 1), 8000))
    assert np.abs(read - (left + right) / 2).max() < 1e-4


def test_resampling_keeps_the_waveform():
    """Away from the ends, where the filter sees zeros; 6e-4 was seen."""
    error = resample(tone(300, 22050), 22050, 8000)[:800] - tone(300, 8000)
    assert np.abs(error[50:-50]).max() < 2e-3


def test_trimming():
    quiet = np.full(100, 1e-4)
    cut = trimmed(np.concatenate([quiet, tone(400, 8000), quiet]), 8000)
    assert 780 < len(cut) <= 800 and np.abs(cut).max() == pytest.approx(0.9)
    assert len(trimmed(np.zeros(5), 8000)) == 0


def test_a_click_neither_hides_speech_nor_begins_it():
    rate = 8000
    speech = 0.01 * tone(200, rate, 1.0)
    for place, length in ((4000, 1), (4000, 30)):  # samples
        clicked = speech.copy()
        clicked[place : place + length] = 1.0
        assert len(trimmed(clicked, rate)) > 7900
    silence = np.zeros(2000)
    early = np.concatenate([silence, [1.0], silence, speech, silence])
    assert abs(len(trimmed(early, rate)) - len(speech)) < 100
    assert len(trimmed(np.concatenate([silence, [1.0], silence]), rate)) == 1  # a click is all there is


def test_antiphase_is_said_as_it_is(tmp_path):
    path = write(tmp_path / "a.wav", np.stack([tone(400, 8000), -tone(400, 8000)], 1), 8000)
    with pytest.raises(ValueError, match="a.wav has 2 channels that cancel each other when they are averaged"):
        read_wav(path)
    waves = np.stack([tone(400, 8000), -tone(400, 8000)], 1)
    with pytest.raises(ValueError, match="waves: got one that has 2 channels that cancel each other"):
        AudioProcessor(8000)([waves])
    _, read = read_wav(write(path, np.zeros((50, 2)), 8000))  # silence is no antiphase
    assert not read.any()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (wav(bytes(400))[:-200], r"its header says 444 bytes, and it has 244: it was cut short"),
        (wav(bytes(400), riff=0), "is longer than its header says"),
        (wav(bytes(400), riff=2**32 - 1, data=2**32 - 1), "it was cut short"),
        (wav(bytes(400), data=600), "its part b'data' has 600 bytes, 400 of them in the file"),
        (wav(bytes(400), rate=2**31 - 1), "its sampling rate is 2147483647 Hz"),
        (wav(bytes(400), channels=0), "it has 0 channels in 0 bytes"),
        (wav(bytes(401)), "401 bytes of samples, which are no whole number of 2"),
        (wav(bytes(400), kind=85), "samples of format 85"),
        (wav(np.full(50, 1e200).tobytes(), kind=3, width=8), r"floats up to 1e\+200; expected about -1 … 1"),
        (b"", "it is empty"),
    ],
)
def test_damaged_wav_files(tmp_path, content, match):
    path = tmp_path / "a.wav"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"a.wav cannot be read as a WAV file .*{match}") as error:
        read_wav(path)
    assert "\n" not in str(error.value)


def test_wav_files_are_read_as_scipy_reads_them(tmp_path):
    rng = np.random.default_rng(0)
    for width, kind in ((2, "<i2"), (4, "<i4")):
        samples = rng.integers(-(2 ** (8 * width - 1)), 2 ** (8 * width - 1), (50, 2)).astype(kind)
        wavfile.write(tmp_path / "a.wav", 8000, samples)
        expected = samples.astype(np.float64).mean(1) / 2 ** (8 * width - 1)
        assert np.abs(read_wav(tmp_path / "a.wav")[1] - expected).max() < 1e-12
    values = np.array([0, 1, -1, 2**23 - 1, -(2**23), 12345], "<i4")
    raw = values.view(np.uint8).reshape(-1, 4)[:, :3].tobytes()
    (tmp_path / "b.wav").write_bytes(wav(raw, width=3))
    assert np.array_equal(read_wav(tmp_path / "b.wav")[1] * 2**23, values)
    with pytest.raises(ValueError, match="at 700000 Hz has more than 268435456 samples"):
        resample(np.zeros(1000), 1, 700_000)


def damage(folder, kind):
    path = folder / "low" / "1.wav"
    if kind == "no wav":
        path.write_bytes(b"not a sound")
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:20])
    elif kind == "silent":
        write(path, np.zeros(100), 8000)
    elif kind == "empty":
        write(path, np.zeros(0), 8000)
    elif kind == "nan":
        wavfile.write(path, 8000, np.array([0.1, np.nan], np.float32))
    elif kind == "alone":
        (folder / "high" / "0.wav").unlink()
        (folder / "high" / "1.wav").unlink()
    elif kind == "no classes":
        shutil.rmtree(folder / "low")
        shutil.rmtree(folder / "high")
    elif kind == "no folder":
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no wav", r"low/1.wav cannot be read as a WAV file"),
        ("cut", r"low/1.wav cannot be read as a WAV file|low/1.wav has no samples"),
        ("silent", r"low/1.wav is silent; remove it"),
        ("empty", r"low/1.wav has no samples"),
        ("nan", r"low/1.wav has no samples, or some that are not finite"),
        ("alone", r"high has 1 WAV files; expected at least 2"),
        ("no classes", r"which has no subfolders; expected one of WAVs per class"),
        ("no folder", r"which is not a folder"),
    ],
)
def test_unusable_folders(sounds, kind, message):
    damage(sounds, kind)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_audio_data(config(sounds))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(name="audio_folder"), "folder: got none; audio_folder needs"),
        (dict(sampling_rate=0), "sampling_rate: got 0; expected at least 1"),
        (dict(num_samples=0), "num_samples: got 0"),
        (dict(hop=0), "hop: got 0"),
        (dict(held_out_fraction=1.0), "held_out_fraction: got 1.0"),
        (dict(folder="/x"), "with spoken_digits, which espeak-ng makes; leave it out"),
    ],
)
def test_unusable_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        AudioDataConfig(**fields)


def test_unknown_name():
    with pytest.raises(ValueError, match="name: got 'music'; expected one of spoken_digits, alsa, audio_folder"):
        load_audio_data(AudioDataConfig(name="music"))


def test_no_window_reaches_into_the_held_out_end_of_a_file(tmp_path):
    """Ramps: every sample of a file is above the ones before it."""
    for name in ("a", "b"):
        write(tmp_path / f"{name}.wav", np.linspace(0.1, 0.9, 1000), 8000)
    data = load_audio_data(config(tmp_path, name="alsa", num_samples=200, hop=50))
    train = data.train.batch(range(len(data.train)))["input_values"]
    held_out = data.held_out.batch([0, 1])["input_values"]
    assert train.max() < held_out.min() and len(train) == 2 * 13
    assert data.class_names == ("a", "b") and data.held_out.labels.tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"a.wav has 1000 samples at 8000 Hz; expected two windows .*= 501: lower it"):
        load_audio_data(config(tmp_path, name="alsa", num_samples=501))
    with pytest.raises(FileNotFoundError, match="apt-get install alsa-utils"):
        load_audio_data(config(tmp_path / "none", name="alsa"))


def test_alsa_utils_of_debian():
    if not ALSA_FOLDER.is_dir():
        pytest.skip("NOT TESTED: Debian's alsa-utils is not installed: apt-get install alsa-utils")
    data = load_audio_data(AudioDataConfig(name="alsa"))
    assert {"Front_Left", "Noise"} <= set(data.class_names) and len(data.held_out) == len(data.class_names)
    assert set(data.train.labels.tolist()) == set(range(len(data.class_names)))


@pytest.fixture
def espeak():
    if shutil.which("espeak-ng") is None:
        pytest.skip("NOT TESTED: Debian's espeak-ng is not installed: apt-get install espeak-ng")


@pytest.fixture
def three_voices(monkeypatch):
    monkeypatch.setattr("fastdiff.data.audio.VOICES", VOICES)


def test_spoken_digits(espeak, three_voices, cache, monkeypatch, capsys, tmp_path):
    data = load_audio_data(AudioDataConfig())
    assert "resampled to 8000 Hz" in capsys.readouterr().err
    assert data.train.labels.tolist() == list(range(10)) * 2 and data.held_out.labels.tolist() == list(range(10))
    waveforms = data.train.batch(range(20))["input_values"]
    assert (waveforms.abs().amax(1) > 0.85).all() and len(waveforms.unique(dim=0)) == 20
    # spoken once: without the program the cache serves; another cache gets the same sounds
    monkeypatch.setattr("fastdiff.data.spoken_digits._synthesise", lambda *args: pytest.fail("spoken again"))
    assert load_audio_data(AudioDataConfig()).fingerprint == data.fingerprint
    monkeypatch.undo()
    monkeypatch.setattr("fastdiff.data.audio.VOICES", VOICES)
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "other"))
    assert load_audio_data(AudioDataConfig()).fingerprint == data.fingerprint


def test_longer_digits_are_cut_and_counted(espeak, three_voices, cache, capsys):
    data = load_audio_data(AudioDataConfig(num_samples=1024))  # 0.128 s
    assert "sounds are longer than num_samples = 1024 and cut" in capsys.readouterr().err
    assert data.train.batch([0])["input_values"].shape == (1, 1024)


def test_a_failed_synthesis_leaves_nothing(espeak, cache):
    with pytest.raises(RuntimeError, match="espeak-ng could not say 'zero'"):
        load_utterances((Voice("xx-nowhere", "m1", 50, 200),))
    assert [path.name for path in (cache / "sounds").iterdir() if not path.name.endswith(".lock")] == []


def test_a_damaged_cache_is_named(espeak, cache):
    voices = VOICES[:1]
    load_utterances(voices)
    (folder,) = (path for path in (cache / "sounds").iterdir() if path.is_dir())
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"sha256": "0"}))
    with pytest.raises(ValueError, match="is damaged .* delete it, and it is made again"):
        load_utterances(voices)
    (folder / "samples.npy").unlink()  # not whole: made again
    assert len(load_utterances(voices).limits) == 11


def test_without_espeak(cache, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match="apt-get install espeak-ng") as error:
        load_audio_data(AudioDataConfig())
    assert "\n" not in str(error.value)
