"""Pictures of every mode: turned, scaled and composed as they are looked at; what is refused; the check of files."""

import os

import numpy as np
import pytest
import torch
from file_seeds import png
from PIL import Image

from fastdiff.data import DataConfig, VideoDataConfig, load_data, load_video_data
from fastdiff.data.pictures import MAX_PIXELS, picture_size, read_picture
from fastdiff.models.qgfd.adapters.processors import ImageProcessor

RAMP = np.linspace(0, 65535, 256).round().astype(np.uint16)[None].repeat(3, 0)


def pixels(path, channels=3):
    return np.asarray(read_picture(path, channels)).astype(int)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
def test_exif_turns_pictures(tmp_path, suffix, orientation):
    """A white corner lies where EXIF's definition puts row 0 and column 0 of the file."""
    array = np.zeros((16, 24), np.uint8)
    array[:8, :8] = 255
    exif = Image.Exif()
    exif[0x112] = orientation
    Image.fromarray(array).save(tmp_path / f"a.{suffix}", exif=exif)
    read = pixels(tmp_path / f"a.{suffix}", 1)
    assert read.shape == ((16, 24) if orientation < 5 else (24, 16))
    assert picture_size(tmp_path / f"a.{suffix}") == read.shape[::-1]
    row, column = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}[
        orientation
    ]
    assert read[row, column] > 200 and (read > 200).sum() == 64


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_greys_of_16_bits_are_scaled(tmp_path, suffix):
    Image.fromarray(RAMP).save(tmp_path / f"a.{suffix}")
    for channels in (1, 3):
        read = pixels(tmp_path / f"a.{suffix}", channels)
        assert read.mean() == 127.5 and np.array_equal(read[0].reshape(256, -1)[:, 0], np.arange(256))


def test_greys_of_other_ranges(tmp_path):
    Image.fromarray((RAMP / 65535).astype(np.float32)).save(tmp_path / "float.tif")
    assert np.array_equal(pixels(tmp_path / "float.tif", 1)[0], np.arange(256))
    Image.fromarray(RAMP).save(tmp_path / "inverted.tif", tiffinfo={262: 0})  # white is zero
    assert np.array_equal(pixels(tmp_path / "inverted.tif", 1)[0], np.arange(256)[::-1])
    Image.fromarray(RAMP.astype(np.float32)).save(tmp_path / "wide.tif")
    with pytest.raises(ValueError, match="wide.tif cannot be decoded .*floats 0 … 65535; expected 0 … 1"):
        read_picture(tmp_path / "wide.tif", 1)
    Image.fromarray(RAMP.astype(np.int32)).save(tmp_path / "integers.tif")
    with pytest.raises(ValueError, match="integers of 32 bits, whose white is not known"):
        read_picture(tmp_path / "integers.tif", 1)
    Image.fromarray(np.full((2, 2), np.nan, np.float32)).save(tmp_path / "nan.tif")
    with pytest.raises(ValueError, match="floats nan"):
        read_picture(tmp_path / "nan.tif", 1)


def transparent(mode):
    """Red, opaque on the left; on the right a colour that alpha 0 hides, and in the middle half of it."""
    array = np.zeros((1, 3, 4), np.uint8)
    array[..., 0], array[0, :, 3] = 255, (255, 128, 0)
    return Image.fromarray(array).convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_alpha_is_composed_on_white(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "PA" else "a.png")
    image = transparent("RGBA") if mode == "PA" else transparent(mode)
    image.save(path)
    read = pixels(path)
    opaque = 76 if mode == "LA" else 0  # red as grey
    assert read[0, 2].tolist() == [255] * 3 and read[0, 0, 1] == opaque
    assert abs(read[0, 1, 1] - (opaque * 128 + 255 * 127) / 255) <= 1
    processed = ImageProcessor((1, 3), 3)([image])["pixel_values"]
    assert torch.equal(((processed[0] + 1) * 127.5).round().int().permute(1, 2, 0), torch.from_numpy(read).int())


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_transparent_colours_of_palettes(tmp_path, suffix):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / f"a.{suffix}", transparency=1)
    assert pixels(tmp_path / f"a.{suffix}").tolist() == [[[255, 0, 0], [255, 255, 255]]]
    image.save(tmp_path / f"b.{suffix}")
    assert pixels(tmp_path / f"b.{suffix}").tolist() == [[[255, 0, 0], [0, 255, 0]]]


def test_transparent_greys(tmp_path):
    Image.fromarray(np.array([[0, 200]], np.uint8)).save(tmp_path / "a.png", transparency=0)
    assert pixels(tmp_path / "a.png", 1).tolist() == [[255, 200]]
    Image.fromarray(np.array([[5, 257 * 9]], np.uint16)).save(tmp_path / "b.png", transparency=5)
    assert pixels(tmp_path / "b.png", 1).tolist() == [[255, 9]]


def test_other_modes(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 0, 0)).save(tmp_path / "a.jpg")
    assert np.abs(pixels(tmp_path / "a.jpg") - [255, 0, 255]).max() <= 2
    frames = [Image.new("L", (2, 2), grey) for grey in (10, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (pixels(tmp_path / "a.gif", 1) == 10).all()
    Image.new("1", (2, 2), 1).save(tmp_path / "b.png")
    assert (pixels(tmp_path / "b.png", 1) == 255).all()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_and_strangers(tmp_path):
    for content, match in (
        (png(60_000, 60_000), f"60000 x 60000 pixels; expected at most {MAX_PIXELS}|bomb"),
        (png(9_500, 9_500), "9500 x 9500 pixels; expected at most"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is none of PNG, JPEG"),  # Ghostscript's
    ):
        path = tmp_path / "a.png"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=match) as error:
            picture_size(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def folder(tmp_path, cache):
    """Classes 1, 10 and 2 of three pictures each, whose grey is the class."""
    for name in ("1", "10", "2"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(3):
            noise = np.random.default_rng(index).integers(0, 3, (24, 24), np.uint8)
            Image.fromarray(noise + 10 * int(name)).save(tmp_path / "photos" / name / f"{index}.png")
    return tmp_path / "photos"


def test_class_folders_in_natural_order(folder):
    data = load_data(DataConfig("image_folder", folder=str(folder), image_size=8, channels=1))
    assert data.class_names == ("1", "2", "10")
    greys = (data.train.images(range(6)).mean(dim=(1, 2, 3)) + 1) * 12.75
    assert greys.round().int().tolist() == [1, 1, 2, 2, 10, 10]


def test_frames_in_natural_order(tmp_path, cache):
    for video in ("v1", "v2"):
        (tmp_path / "films" / "a" / video).mkdir(parents=True)
        for index in range(12):
            Image.new("L", (8, 8), index * 20).save(tmp_path / "films" / "a" / video / f"frame{index}.png")
    data = load_video_data(VideoDataConfig("video_folder", folder=str(tmp_path / "films"), num_frames=12, frame_size=8))
    greys = ((data.train.batch([0])["pixel_values"] + 1) * 127.5).round().amax(dim=(2, 3, 4))
    assert greys.tolist() == [[20.0 * index for index in range(12)]]


def test_all_files_are_decoded_once_before_training(folder, monkeypatch):
    broken = [folder / "10" / "1.png", folder / "2" / "0.png"]
    whole = broken[0].read_bytes()
    for path in broken:
        path.write_bytes(whole[:-200])  # in the pixels; the header is whole
    config = DataConfig("image_folder", folder=str(folder), image_size=8)
    with pytest.raises(
        ValueError, match=r"2/0.png cannot be decoded .*so are 1 more of 9 files, such as .*10/1.png"
    ) as error:
        load_data(config)
    assert "\n" not in str(error.value)
    load_data(DataConfig("image_folder", folder=str(folder), image_size=8, check="headers"))
    for path in broken:
        path.write_bytes(whole)
    load_data(config)
    decoded = []
    monkeypatch.setattr("fastdiff.data.file_checks.check_picture", lambda path: decoded.append(path))
    load_data(config)
    assert decoded == []  # known
    os.utime(broken[0], (1, 1))
    load_data(config)
    assert len(decoded) == 9


def test_a_flipped_bit_is_seen_by_its_checksum(folder):
    path = folder / "1" / "0.png"
    content = bytearray(path.read_bytes())
    content[-14] ^= 1  # of the pixels' CRC
    path.write_bytes(content)
    with pytest.raises(ValueError, match="1/0.png cannot be decoded"):
        load_data(DataConfig("image_folder", folder=str(folder), image_size=8))
