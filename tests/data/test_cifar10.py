"""CIFAR-10 from files of the published formats, with captions; and what is refused of both."""

import json
import pickle

import numpy as np
import pytest
import torch
from file_seeds import cifar_batch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.data import DataConfig, load_data
from fastdiff.data.cifar10 import CIFAR10_CLASSES, SYNONYMS, read_batch, with_synonym

NAMES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
COUNT = 12  # images of a file


def batch_of(number):
    rng = np.random.default_rng(number)
    labels = [int(label) for label in (np.arange(COUNT) + number) % 10]
    return rng.integers(0, 256, (COUNT, 3072), dtype=np.uint8), labels


def python2_pickle(number):
    return cifar_batch(*batch_of(number))


def write_pickles(folder, contents=None):
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(NAMES):
        (folder / name).write_bytes((contents or {}).get(name) or python2_pickle(number))
    meta = {b"label_names": [name.encode() for name in CIFAR10_CLASSES], b"num_vis": 3072}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))


def write_binary(folder):
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(NAMES):
        data, labels = batch_of(number)
        (folder / f"{name}.bin").write_bytes(np.column_stack([np.array(labels, np.uint8), data]).tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(CIFAR10_CLASSES) + "\n")


def load(folder, **fields):
    return load_data(DataConfig(name="cifar10", folder=str(folder), **fields))


@pytest.fixture
def folder(tmp_path):
    write_pickles(tmp_path / "cifar-10-batches-py")
    return tmp_path / "cifar-10-batches-py"


def test_both_versions_give_the_same(tmp_path, folder):
    write_binary(tmp_path / "cifar-10-batches-bin")
    data, binary = load(folder), load(tmp_path / "cifar-10-batches-bin")
    assert data.fingerprint == binary.fingerprint == load(tmp_path).fingerprint
    assert len(data.train) == 5 * COUNT and len(data.held_out) == COUNT and data.image_shape == (3, 32, 32)
    assert data.class_names == CIFAR10_CLASSES
    pixels, labels = batch_of(1)
    assert np.array_equal(data.train.pixels[COUNT : 2 * COUNT].numpy().reshape(COUNT, -1), pixels)
    assert data.train.labels[COUNT : 2 * COUNT].tolist() == labels
    assert torch.equal(data.attributes["class"].held_out, data.held_out.labels)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_that_python_3_writes(folder, protocol):
    before = load(folder)
    for number, name in enumerate(NAMES):
        data, labels = batch_of(number)
        content = {"batch_label": "x", "labels": labels, "data": data, "filenames": ["a.png"] * COUNT}
        (folder / name).write_bytes(pickle.dumps(content, protocol=protocol))
    if protocol == 5:  # its arrays are made of buffers by another function of NumPy's
        with pytest.raises(ValueError, match="asks for numpy._core.numeric._frombuffer"):
            load(folder)
    else:
        assert load(folder).fingerprint == before.fingerprint


class Print:
    def __reduce__(self):
        return print, ("executed",)


class Opens:
    def __reduce__(self):
        return open, ("/etc/passwd",)


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (Print(), r"asks for (builtins|__builtin__).print; expected arrays"),
        (Opens(), r"asks for (io|_io).open; expected arrays"),
        (np.dtype("O"), "it holds Dtype among arrays"),
        ({1, 2}, "asks for __builtin__.set|it holds set among arrays"),
        ([1, [2]], "it holds list among arrays"),
        (np.arange(3.0), "has an array that is not one of bytes"),
        (np.asfortranarray(np.zeros((3, 2), np.uint8)), "has an array that is not one of bytes, row by row"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_pickles_of_anything_else_are_refused(folder, capsys, thing, message, protocol):
    data, labels = batch_of(0)
    content = {"labels": labels, "data": data, "more": thing}
    (folder / "data_batch_1").write_bytes(pickle.dumps(content, protocol=protocol))
    with pytest.raises(ValueError, match=rf"data_batch_1 is not a pickle of .* version .*({message})") as error:
        load(folder)
    assert "\n" not in str(error.value) and "executed\n" not in capsys.readouterr().out


def pickled(**fields):
    return pickle.dumps(fields, protocol=2)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 400), st.integers(0, 60))
def test_damaged_pickles_are_one_line(tmp_path_factory, content, place, left_out):
    folder = tmp_path_factory.mktemp("damaged")
    whole = python2_pickle(0)
    (folder / "data_batch_1").write_bytes(whole[:place] + content + whole[place + left_out :])
    try:
        data, labels = read_batch(folder / "data_batch_1")
    except ValueError as error:
        assert "data_batch_1" in str(error) and "\n" not in str(error)
    else:
        assert data.shape == (len(labels), 3, 32, 32)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data_batch_3", pickled(labels=[1]), "data_batch_3: got 'labels'; expected the array data"),
        ("data_batch_3", pickle.dumps([1], protocol=2), "data_batch_3 is not a pickle .*it holds list, not a dict"),
        ("data_batch_3", b"GIF89a", "data_batch_3 is not a pickle"),
        ("data_batch_3", b"\x80\x05\x96" + (2**33).to_bytes(8, "little"), "it asks for a bytearray; expected arrays"),
        ("test_batch", python2_pickle(0)[:-3000], "test_batch is not a pickle"),
        ("data_batch_2", pickled(labels=[10], data=np.zeros((1, 3072), np.uint8)), "data_batch_2: got labels 10"),
        ("data_batch_2", pickled(labels=[1], data=np.zeros((1, 3), np.uint8)), r"got data of shape \[1, 3\] and 1"),
        (
            "data_batch_2",
            pickled(labels=[2**80], data=np.zeros((1, 3072), np.uint8)),
            "data_batch_2: its labels are no",
        ),
        ("batches.meta", pickled(label_names=["cat"]), "batches.meta: got the classes"),
    ],
)
def test_damaged_files(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_missing_and_cut_files(tmp_path, folder):
    (folder / "data_batch_4").unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_4 is missing"):
        load(folder)
    with pytest.raises(FileNotFoundError, match="has no data_batch_1 or data_batch_1.bin"):
        load(tmp_path / "none")
    with pytest.raises(ValueError, match="folder: got none; cifar10 needs the folder"):
        load_data(DataConfig(name="cifar10"))
    binary = tmp_path / "binary"
    write_binary(binary)
    whole = (binary / "data_batch_1.bin").read_bytes()
    (binary / "data_batch_1.bin").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"got {len(whole) - 1} bytes; expected records of 3073"):
        load(binary)


# ------------------------------------------------------------------------------------------------ captions


def write_captions(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_captions_and_synonyms(tmp_path, folder):
    labels = load(folder).train.labels.tolist()
    captions = {0: "An airplane in the sky.", 7: "something else", 59: "a boat at sea"}
    rows = [{"index": i, "label_index": labels[i], "caption": caption} for i, caption in captions.items()]
    data = load(folder, captions=write_captions(tmp_path / "captions.jsonl", rows))
    assert data.captions.entries == ("base", "base_syn", "caption", "caption_syn")

    def texts(index, part="train"):
        return [data.captions.texts[n] if n >= 0 else None for n in data.captions.rows(part)[index].tolist()]

    assert labels[0] == 0 and texts(0) == ["airplane", "plane", "An airplane in the sky.", "A plane in the sky."]
    assert texts(7)[2:] == ["something else", None]  # no word for its class is in it
    assert texts(1)[2:] == [None, None] and texts(3, "held_out")[2:] == [None, None]
    assert texts(3, "held_out")[0] == CIFAR10_CLASSES[data.held_out.labels[3]]
    assert data.fingerprint != load(folder).fingerprint
    base = data.prompts_of({"class": "cat"}, part="train", entries=("base", "base_syn"))
    assert "cat" in base and len(base) > 1 and set(base) <= {"cat", *SYNONYMS["cat"]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"index": 60}, "line 2: index: got 60; expected 0 … 59"),
        ({"index": -1}, "line 2: index: got -1"),
        ({"index": True}, "line 2: index: got True; expected a whole number"),
        ({"label_index": 4}, r"line 2: label_index: got 4; image 1 has 1 \(automobile\)"),
        ({"label_index": "1"}, "line 2: label_index: got '1'; expected a whole number"),
        ({"caption": " "}, "line 2: caption: got an empty one"),
        ({"caption": 3}, "line 2: field 'caption' is int; expected a string"),
        ({"index": 0, "label_index": 0}, "line 2: index: got 0 a second time"),
    ],
)
def test_captions_that_do_not_fit(tmp_path, folder, row, message):
    fine = {"index": 0, "label_index": 0, "caption": "an airplane"}
    rows = [fine, {"index": 1, "label_index": 1, "caption": "a car", **row}]
    with pytest.raises(ValueError, match=message):
        load(folder, captions=write_captions(tmp_path / "captions.jsonl", rows))


def test_captions_that_are_missing_or_out_of_place(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="captions: got .*none.jsonl', which is not a file"):
        load(folder, captions=str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match="captions: got 'a.jsonl' with digits"):
        DataConfig(name="digits", captions="a.jsonl")


@pytest.mark.parametrize(
    ("caption", "name", "expected"),
    [
        ("a photo of an automobile", "automobile", "a photo of a car"),
        ("A truck, parked", "truck", "A lorry, parked"),
        ("the Bird sings", "bird", "the small bird sings"),
        ("a carpet", "automobile", None),
        ("a plane over an airplane", "airplane", "an airplane over an airplane"),
    ],
)
def test_another_word_stands_for_the_class(caption, name, expected):
    assert with_synonym(caption, name, 0) == expected
