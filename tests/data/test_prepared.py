"""Clip art and stamps: texts of their files, pictures drawn once, kills, broken files; the command `prepare`."""

import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from fastdiff.data import CaptionedData, DataConfig, clipart, load_data, stamps
from fastdiff.data.caption_sets import SOURCES, prepare
from fastdiff.data.growing import GrowingArray
from fastdiff.prepare import main

SVG = """<?xml version="1.0" encoding="UTF-8" standalone="no"?>
<svg width="{page}mm" height="{page}mm" xmlns="http://www.w3.org/2000/svg"
 xmlns:cc="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/"
 xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
 <title>not the one that is read</title>
 <metadata><rdf:RDF><cc:Work rdf:about="">
  <dc:title>{title}</dc:title>
  <dc:description>{description}</dc:description>
  <dc:subject><rdf:Bag>{keywords}</rdf:Bag></dc:subject>
  <dc:publisher><cc:Agent><dc:title>Open Clip Art Library</dc:title></cc:Agent></dc:publisher>
  <dc:creator><cc:Agent><dc:title>Jane Doe</dc:title></cc:Agent></dc:creator>
  <cc:license rdf:resource="{license}"/>
 </cc:Work></rdf:RDF></metadata>
 <rect x="{x}" y="40" width="60" height="30" fill="{fill}"/>
</svg>
"""
PUBLIC_DOMAIN = "http://web.resource.org/cc/PublicDomain"
TITLES = [f"{animal} {number}" for animal in ("dog", "cat", "cow", "fox", "owl") for number in (1, 2, 3)]


def write_svg(path, title="", keywords=(), description="", fill="red", license=PUBLIC_DOMAIN, page=100, x=20):
    path.parent.mkdir(parents=True, exist_ok=True)
    items = "".join(f"<rdf:li>{word}</rdf:li>" for word in keywords)
    fields = dict(title=title, keywords=items, description=description, license=license, fill=fill, page=page, x=x)
    path.write_text(SVG.format(**fields))


@pytest.fixture
def folder(tmp_path, cache):
    """15 drawings of five titles."""
    for index, title in enumerate(TITLES):
        write_svg(tmp_path / "svg" / f"a{index:02}.svg", title, ["animal"], fill=f"#{9 * index:02x}00ff")
    return tmp_path / "svg"


def config_of(folder, **fields):
    return DataConfig(**{"name": "clipart", "folder": str(folder), "image_size": 16, **fields})


def texts_of(data):
    """The texts of each picture by its file, an entry each."""
    found = {}
    for part in ("train", "held_out"):
        for file, row in zip(data.files[part], data.captions.rows(part).tolist(), strict=True):
            found[file] = [None if number < 0 else data.captions.texts[number] for number in row]
    return found


# ------------------------------------------------------------------------------------------------ clip art


def test_texts_of_clip_art(folder):
    for number in range(13):
        write_svg(folder / f"theme{number}.svg", "Lemon SVG theme", ["icon"], fill=f"#00{number:02x}00")
        write_svg(
            folder / f"named{number}.svg", f"Bird Nr. {chr(97 + number)}", [], "Part of a big and nice set", "green"
        )
    write_svg(folder / "a/ball.svg", "Red_Ball2", ["Toy", "", "hash", "jane doe", "0x91c6b24", "round_thing", "toy"],
              "A ball that\n  is red. It bounces.", "#123456")  # fmt: skip
    write_svg(folder / "b.svg", "Led (green)", [], "EPS converted from http://aiga.org", "#123457")
    write_svg(folder / "c.svg", "Clipart by Nicu - Old-tree", ["tree"], "A tree", "#123458")
    write_svg(folder / "d.svg", "Jane Doe", ["face"], "The face of somebody", "#123459")
    write_svg(folder / "e.svg", "", ["keyword"], "me@example.org wrote this text", "#123460")
    write_svg(folder / "f.svg", "A gnu", [], license="http://creativecommons.org/licenses/GPL/2.0/")
    (folder / "link.svg").symlink_to(folder / "b.svg")
    data = load_data(config_of(folder))
    assert isinstance(data, CaptionedData) and data.captions.entries == ("title", "keywords", "caption")
    texts = texts_of(data)
    assert texts["a/ball.svg"] == ["red ball", "toy, round thing", "A ball that is red."]
    assert texts["b.svg"] == ["led, green", None, None]
    assert texts["c.svg"] == ["old tree", "tree", None]
    assert texts["d.svg"] == [None, "face", "The face of somebody"]
    assert texts["a03.svg"] == ["cat", "animal", None]
    birds = [row for file, row in texts.items() if file.startswith("named")]
    assert birds == [["bird nr. a", None, None]]  # a description of 13 is no caption; all look alike
    assert set(texts) == {
        *(f"a{index:02}.svg" for index in range(15)),
        "named0.svg",
        "a/ball.svg",
        "b.svg",
        "c.svg",
        "d.svg",
    }
    assert data.left_out == {
        "without a title or description of their own": 14,
        "under the GPL": 1,
        "look as another": 12,
    }
    assert {*data.licenses["train"], *data.licenses["held_out"]} == {PUBLIC_DOMAIN}
    assert [len(data.licenses[part]) for part in data.files] == [len(data.train), len(data.held_out)]


def test_a_series_is_on_one_side(folder):
    data = load_data(config_of(folder))
    sides = [{texts_of(data)[file][0] for file in data.files[part]} for part in ("train", "held_out")]
    assert sides[0] | sides[1] == {"dog", "cat", "cow", "fox", "owl"} and not sides[0] & sides[1]
    assert len(data.held_out) == 3 and len(data.train) == 12


def test_a_small_drawing_on_a_large_page_fills_the_picture(folder):
    write_svg(folder / "dot.svg", "a dot", fill="#0000ff", page=500, x=200)
    write_svg(folder / "off.svg", "nothing", page=100, x=5000)
    data = load_data(config_of(folder, image_size=25))
    assert data.left_out == {"draw nothing that is seen on white": 1} and data.broken == ()
    part = next(part for part in data.files if "dot.svg" in data.files[part])
    batch = getattr(data, part).batch([data.files[part].index("dot.svg")])
    assert batch["pixel_values"].shape == (1, 3, 25, 25) and batch["pixel_values"].dtype == torch.float32
    picture = batch["pixel_values"][0]
    blue = torch.tensor([-1.0, -1, 1])[:, None, None]
    found = torch.nonzero((picture - blue).abs().amax(0) < 0.05)
    # 23 pixels wide, half as high, in the middle, the edges mixed with white
    assert [each.item() for each in (*found.amin(0), *found.amax(0))] == pytest.approx([6.5, 1, 17.5, 23], abs=1.6)
    assert torch.equal(picture[:, :5], torch.ones(3, 5, 25))


def test_prepared_data_opens_without_drawing(folder, monkeypatch):
    data = load_data(config_of(folder))
    assert isinstance(data.train.pixels, np.memmap) and not data.train.pixels.flags.writeable
    monkeypatch.setattr(clipart, "read_svg", None)
    monkeypatch.setattr(clipart, "_metadata", None)
    again = load_data(config_of(folder))
    assert again.fingerprint == data.fingerprint and texts_of(again) == texts_of(data)
    with pytest.raises(TypeError):
        load_data(config_of(folder, image_size=8))  # another size is drawn
    monkeypatch.undo()
    write_svg(folder / "a00.svg", "wolf", fill="#777777")
    assert load_data(config_of(folder)).fingerprint != data.fingerprint


# ------------------------------------------------------------------------------------------------ kills and damage


def test_after_a_kill_it_goes_on(tmp_path, cache, monkeypatch):
    for index in range(90):
        write_svg(tmp_path / "svg" / f"{index:03}.svg", f"thing {index} of many", fill=f"#{index:02x}8000")
    config, read = config_of(tmp_path / "svg"), clipart.read_svg

    def doomed(path, size):
        if path.name == "080.svg":
            os.kill(os.getpid(), signal.SIGKILL)
        return read(path, size)

    monkeypatch.setattr(clipart, "read_svg", doomed)
    child = os.fork()
    if child == 0:
        try:
            prepare(config, progress=False)
        finally:
            os._exit(3)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    (unfinished,) = (cache / "prepared").glob("*.unfinished")
    with open(unfinished / "pixels.npy", "ab") as file:
        file.write(b"half of a block")  # that had not been marked
    seen = []
    monkeypatch.setattr(clipart, "read_svg", lambda path, size: seen.append(path.name) or read(path, size))
    monkeypatch.setattr(clipart, "_metadata", None)  # texts were read before the kill
    data = prepare(config, progress=False)
    assert sorted(seen) == [f"{index:03}.svg" for index in range(64, 90)] and not unfinished.exists()
    monkeypatch.undo()
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "other"))
    assert load_data(config).fingerprint == data.fingerprint


def test_broken_files_are_named(folder, capsys):
    (folder / "a04.svg").write_text("<svg")
    write_svg(folder / "a05.svg", "zebra", fill="#ff0000")
    (folder / "a05.svg").write_text((folder / "a05.svg").read_text()[:-30])
    with pytest.raises(
        ValueError, match=r"a04.svg cannot be drawn as an SVG .* \(1 more of 15 files are broken"
    ) as raised:
        load_data(config_of(folder))
    assert "\n" not in str(raised.value) and "fastdiff prepare clipart --skip-broken" in str(raised.value)
    main(["clipart", "--folder", str(folder), "--image-size", "16", "--skip-broken"])
    printed = capsys.readouterr()
    assert printed.out.startswith("clipart: 10 pictures to train on, 3 held out, in ")
    assert "left out: 2 (broken): a04.svg, a05.svg\n" in printed.err
    data = load_data(config_of(folder))  # once prepared so, it stays so
    assert len(data.train) + len(data.held_out) == 13 and data.broken == ("a04.svg", "a05.svg")


def test_a_damaged_cache_is_named(folder):
    place = load_data(config_of(folder)).place
    content = (place / "pixels.npy").read_bytes()
    (place / "pixels.npy").unlink()
    (place / "pixels.npy").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="pixels.npy: was changed after it was written .* delete the folder"):
        load_data(config_of(folder))
    (place / "pixels.npy").write_bytes(content[:-100])
    with pytest.raises(ValueError, match="pixels.npy: not a .npy file .* delete the folder"):
        load_data(config_of(folder))
    (place / "listing.json").write_text('{"files": []}')
    with pytest.raises(ValueError, match="listing.json: not a whole listing .* delete the folder"):
        load_data(config_of(folder))


def test_growing_arrays(tmp_path):
    rows = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
    array = GrowingArray(tmp_path / "a.npy", 4, (3, 2), "float32")
    array.append(rows[:3], {"seen": 3})
    again = GrowingArray(tmp_path / "a.npy", 4, (3, 2), "float32")
    assert (again.done, again.notes) == (3, {"seen": 3})
    again.append(rows[3:], {})
    again.replace(1, rows[0], {"late": True})
    assert np.array_equal(np.load(tmp_path / "a.npy"), rows[[0, 0, 2, 3]])
    assert GrowingArray(tmp_path / "a.npy", 4, (3, 2), "float32").notes == {"late": True}
    other = GrowingArray(tmp_path / "a.npy", 4, (3, 2), "float16")  # of another form: begun anew
    assert (other.done, other.notes) == (0, {})
    (tmp_path / "a.json").write_text('{"rows": 9, "notes": {}}')
    assert GrowingArray(tmp_path / "a.npy", 4, (3, 2), "float16").done == 0


# ------------------------------------------------------------------------------------------------ stamps


def write_stamp(path, sentence, color, suffixes=(".png",)):
    picture = Image.new("RGBA", (30, 20), (0, 0, 0, 0))
    ImageDraw.Draw(picture).rectangle((5, 5, 14, 14), fill=color)
    if ".png" in suffixes:
        picture.save(path.with_suffix(".png"))
    if ".svg" in suffixes:
        write_svg(path.with_suffix(".svg"), fill="blue")
    if sentence is not None:
        path.with_suffix(".txt").write_text(f"{sentence}\nde.utf8=Etwas\n")


@pytest.fixture
def stamp_folder(tmp_path, cache):
    root = tmp_path / "stamps" / "animals"
    root.mkdir(parents=True)
    for index in range(12):
        write_stamp(root / f"s{index:02}", f"Animal number {chr(97 + index)}.", (20 * index, 0, 0))
    write_stamp(root / "both", "A blue  box. ", "yellow", (".png", ".svg"))
    write_stamp(root / "both_mirror", None, "yellow")
    write_stamp(root / "mute", "", "green")
    return root


def test_stamps(stamp_folder):
    data = load_data(config_of(stamp_folder, name="stamps"))
    texts = texts_of(data)
    assert texts["s03.png"] == ["Animal number d."] and texts["both.svg"] == ["A blue box."] and len(texts) == 13
    assert data.left_out == {"without a sentence": 2} and data.captions.entries == ("caption",)
    assert len(data.held_out) == 2 and set(data.licenses["train"]) == {"GPL-2"}
    part = next(part for part in data.files if "s05.png" in data.files[part])
    picture = getattr(data, part).images([data.files[part].index("s05.png")])[0]
    assert picture[:, 8, 8].tolist() == pytest.approx([100 / 127.5 - 1, -1, -1], abs=0.01)
    assert picture[:, 0, 0].tolist() == [1, 1, 1]  # what is transparent is white


def test_stamps_that_are_refused(stamp_folder):
    content = (stamp_folder / "s01.png").read_bytes()
    (stamp_folder / "s01.png").write_bytes(content[:60])
    with pytest.raises(ValueError, match="s01.png cannot be decoded as an image"):
        load_data(config_of(stamp_folder, name="stamps"))
    (stamp_folder / "s02.txt").write_bytes(b"A caf\xe9.\n")
    with pytest.raises(ValueError, match=r"s02.txt: byte 5 \(0xe9\) is not UTF-8"):
        load_data(config_of(stamp_folder, name="stamps"))


# ------------------------------------------------------------------------------------------------ the command


@pytest.mark.parametrize(
    ("name", "advice"), [("clipart", "apt install openclipart-svg"), ("stamps", "apt install tuxpaint-stamps-default")]
)
def test_what_is_not_installed(name, advice, tmp_path, monkeypatch):
    monkeypatch.setattr({"clipart": clipart, "stamps": stamps}[name], "FOLDER", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=f"folder: got .*none', which has no .*{advice}"):
        load_data(DataConfig(name=name))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["clippart"], "name: got 'clippart'; expected one of clipart, stamps, coco, flickr30k, or a recipe"),
        (["dit_mnist"], "name: got 'mnist5k', which needs no preparation; expected one of clipart"),
        (["coco"], "folder: got none; coco needs the folder of its pictures"),
        (["clipart", "--image-size", "0"], "image_size: got 0; expected at least 1 pixel"),
    ],
)
def test_commands_that_are_refused(arguments, message, capsys, cache):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and message in line


def test_sets_have_loaders_and_fixed_sizes():
    for name in SOURCES:
        with pytest.raises(ValueError, match="resize: got 8 with .*; expected null: set image_size"):
            DataConfig(name=name, resize=8)
