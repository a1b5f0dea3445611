"""COCO captions and Flickr30k, in files of the form in which they are published."""

import json

import pytest
from PIL import Image

from fastdiff.data import DataConfig, load_data
from fastdiff.prepare import main

SIDES = {"train": "train", "restval": "train", "test": "held_out"}


def photo(path, color, size=(24, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def load(name, folder, **fields):
    return load_data(DataConfig(name=name, folder=str(folder), image_size=8, **fields))


def texts_of(data, part):
    """The captions of each picture by its file."""
    rows = data.captions.rows(part).tolist()
    return {
        file: [data.captions.texts[number] for number in row if number >= 0]
        for file, row in zip(data.files[part], rows, strict=True)
    }


# ------------------------------------------------------------------------------------------------ COCO


def official(part, count, first):
    """The parts of captions_*2017.json that are read, and others that are there."""
    ids = range(first, first + count)
    return {
        "info": {"description": "COCO 2017 Dataset", "year": 2017},
        "licenses": [{"url": "http://creativecommons.org/licenses/by/2.0/", "id": 4, "name": "Attribution License"}],
        "images": [
            {"license": 4, "file_name": f"{number:012}.jpg", "height": 16, "width": 24, "id": number} for number in ids
        ],
        "annotations": [
            {"image_id": number, "id": 10 * number + k, "caption": f"A photo of {part} {number} said {k} times.\n"}
            for k in range(2) for number in ids
        ],
    }  # fmt: skip


@pytest.fixture
def coco(tmp_path, cache):
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    for part, count, first in (("train", 4, 9), ("val", 2, 500)):
        content = official(part, count, first)
        (root / "annotations" / f"captions_{part}2017.json").write_text(json.dumps(content))
        for image in content["images"]:
            photo(root / f"{part}2017" / image["file_name"], (image["id"] % 256, 0, 0))
    return root


def test_cocos_own_files(coco):
    data = load("coco", coco)
    assert len(data.train) == 4 and len(data.held_out) == 2 and data.captions.entries == ("caption", "caption")
    assert texts_of(data, "held_out")["val2017/000000000501.jpg"] == [
        "A photo of val 501 said 0 times.", "A photo of val 501 said 1 times.",
    ]  # fmt: skip
    assert list(texts_of(data, "train")) == [f"train2017/{number:012}.jpg" for number in range(9, 13)]
    picture = data.held_out.images([1])
    assert picture.shape == (1, 3, 8, 8) and picture[0, 0, 4, 4].item() == pytest.approx(245 / 127.5 - 1, abs=0.02)
    assert (
        load("coco", coco, captions=str(coco / "annotations/captions_train2017.json")).fingerprint == data.fingerprint
    )


def test_coco_without_its_validation_file(coco):
    (coco / "annotations/captions_val2017.json").unlink()
    data = load("coco", coco, held_out_fraction=0.25)
    assert len(data.train) == 3 and len(data.held_out) == 1
    assert load("coco", coco, held_out_fraction=0.5).held_out.rows.numel() == 2


def karpathy(name, splits, **fields):
    return {
        "dataset": name,
        "images": [
            {
                **fields, "filename": f"{name}_{index}.jpg", "imgid": index, "split": split, "sentids": [index],
                "sentences": [{"tokens": ["a", split], "raw": f"A {split} {index}.", "imgid": index, "sentid": index}],
            }
            for index, split in enumerate(splits)
        ],
    }  # fmt: skip


def test_karpathys_splits_of_coco(coco):
    content = karpathy("coco", ["train", "restval", "val", "test", "test"], filepath="val2014", cocoid=391895)
    content["images"][3]["sentences"].append({"raw": "Another one", "tokens": ["another", "one"]})
    (coco / "dataset_coco.json").write_text(json.dumps(content))
    for index in (0, 1, 3, 4):  # those of val are not needed
        photo(coco / "val2014" / f"coco_{index}.jpg", "blue")
    data = load("coco", coco)  # it goes before COCO's own
    assert texts_of(data, "train") == {"val2014/coco_0.jpg": ["A train 0."], "val2014/coco_1.jpg": ["A restval 1."]}
    assert texts_of(data, "held_out")["val2014/coco_3.jpg"] == ["A test 3.", "Another one"]
    assert data.left_out == {"of the split val, by which one chooses": 1}


def test_missing_photos_are_named_and_left_out(coco, capsys):
    (coco / "train2017/000000000010.jpg").unlink()
    (coco / "val2017/000000000500.jpg").write_bytes(b"no photo")
    with pytest.raises(ValueError, match=r"000000000010.jpg.* \(1 more of 6 files are broken, too\)"):
        load("coco", coco)
    photo(coco / "train2017/000000000010.jpg", "green")  # repaired: it is tried again
    with pytest.raises(ValueError, match="000000000500.jpg cannot be decoded as an image"):
        load("coco", coco)
    main(["coco", "--folder", str(coco), "--image-size", "8", "--skip-broken"])
    assert "4 pictures to train on, 1 held out" in capsys.readouterr().out
    data = load("coco", coco)
    green = data.train.images([data.files["train"].index("train2017/000000000010.jpg")])[0]
    assert green[1, 4, 4] > -0.1 and data.broken == ("val2017/000000000500.jpg",)


def change(content, path, value):
    *before, last = path
    for key in before:
        content = content[key]
    if value is None:
        del content[last]
    else:
        content[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("annotations", 3, "caption"), 7, r"captions_train2017.json: annotations\[3\]: field 'caption' is int"),
        (("annotations", 3, "caption"), " \n", r"annotations\[3\]: got an empty caption"),
        (("annotations", 3), "x", r"annotations\[3\]: got str; expected an object"),
        (("annotations", 0, "image_id"), 77, r"annotations\[0\]: image_id: got 77; expected the id of one of the 4"),
        (("annotations", 0, "image_id"), None, r"annotations\[0\]: image_id: got None; expected an integer"),
        (("images", 1, "file_name"), "../x.jpg", r"images\[1\]: got the file 'train2017/../x.jpg'; expected a name in"),
        (("images", 1, "file_name"), None, r"images\[1\] has no field 'file_name'"),
        (("images",), {}, "captions_train2017.json: images: got dict; expected a list"),
        (("annotations",), None, r"images\[0\] has no field 'split'"),
    ],
)
def test_files_of_coco_that_are_refused(coco, path, value, message):
    content = official("train", 4, 9)
    change(content, path, value)
    (coco / "annotations/captions_train2017.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as raised:
        load("coco", coco)
    assert "\n" not in str(raised.value)


# ------------------------------------------------------------------------------------------------ Flickr30k

CSV = """image_name| comment_number| comment
1.jpg| 0| Two young guys | with shaggy hair .
1.jpg| 1| Two young , White males are outside .
2.jpg| 0| Several men in hard hats .
2.jpg| 4   A dog runs across the grass .
3.jpg| 0| A child in a pink dress .
"""
TOKEN = """1.jpg#0\tTwo young guys | with shaggy hair .
1.jpg#1\tTwo young , White males are outside .
2.jpg#0\tSeveral men in hard hats .
2.jpg#4\tA dog runs across the grass .
3.jpg#0\tA child in a pink dress .
"""


@pytest.fixture
def flickr(tmp_path, cache):
    root = tmp_path / "flickr30k"
    for number in (1, 2, 3):
        photo(root / "flickr30k_images" / f"{number}.jpg", (80 * number, 0, 0), (16, 24))
    return root


@pytest.mark.parametrize(("file", "content"), [("results.csv", CSV), ("results_20130124.token", TOKEN)])
def test_flickrs_own_files(flickr, file, content):
    (flickr / file).write_bytes(content.replace("\n", "\r\n").encode() if file == "results.csv" else content.encode())
    data = load("flickr30k", flickr)
    found = texts_of(data, "train") | texts_of(data, "held_out")
    assert found == {
        "flickr30k_images/1.jpg": ["Two young guys | with shaggy hair .", "Two young , White males are outside ."],
        "flickr30k_images/2.jpg": ["Several men in hard hats .", "A dog runs across the grass ."],
        "flickr30k_images/3.jpg": ["A child in a pink dress ."],
    }
    assert len(data.held_out) == 1 and data.image_shape == (3, 8, 8)


def test_karpathys_splits_of_flickr(flickr):
    content = karpathy("flickr30k", ["train", "val", "test"])
    for index, image in enumerate(content["images"], 1):
        image["filename"] = f"{index}.jpg"
    (flickr / "dataset_flickr30k.json").write_text(json.dumps(content))
    data = load("flickr30k", flickr / "flickr30k_images", captions=str(flickr / "dataset_flickr30k.json"))
    assert texts_of(data, "train") == {"1.jpg": ["A train 0."]} and texts_of(data, "held_out") == {
        "3.jpg": ["A test 2."]
    }


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("results.csv", CSV + "4.jpg|x| a\n", "results.csv, line 7: got '4.jpg|x| a'; expected NAME| NUMBER| CAPTION"),
        ("results.csv", CSV + "1.jpg| 2| \n", "results.csv, line 7: got an empty caption"),
        ("results.csv", CSV.replace("3.jpg", "/3.jpg"), "line 6: got the file '/3.jpg'; expected a name in"),
        ("results.csv", "".join(CSV.splitlines(True)[:3]), "got 1 pictures with up to 2 captions; expected at least 2"),
        ("results_20130124.token", TOKEN + "1.jpg 2\tx\n", "line 6: got '1.jpg 2.tx'; expected NAME#NUMBER<tab>"),
        ("dataset_flickr30k.json", "{", "dataset_flickr30k.json: not a JSON file"),
        (
            "dataset_flickr30k.json",
            json.dumps(karpathy("x", ["train", "dev"])),
            r"images\[1\]: split: got 'dev'; expected val, train, restval, test",
        ),
    ],
)  # fmt: skip
def test_files_of_flickr_that_are_refused(flickr, file, content, message):
    (flickr / file).write_text(content)
    with pytest.raises(ValueError, match=message.replace("|", r"\|")) as raised:
        load("flickr30k", flickr)
    assert "\n" not in str(raised.value)
    (flickr / file).write_bytes(content.encode() + b"\xff")
    with pytest.raises(ValueError, match="UTF-8"):
        load("flickr30k", flickr)


def test_files_that_are_missing(flickr):
    with pytest.raises(
        FileNotFoundError, match="captions: got none, and none in the folder; .* dataset_flickr30k.json"
    ):
        load("flickr30k", flickr)
    with pytest.raises(FileNotFoundError, match="captions: got 'x.csv', which is not a file"):
        load("flickr30k", flickr, captions="x.csv")
    with pytest.raises(FileNotFoundError, match="folder: got .*gone', which is not a folder; expected coco's pictures"):
        load("coco", flickr / "gone")
    with pytest.raises(ValueError, match="folder: got none; coco needs the folder of its pictures"):
        load_data(DataConfig(name="coco"))
