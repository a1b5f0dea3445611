"""Text ready to train on: tokens of each part, the cache, and processes that fill it at once."""

import json
import os
import subprocess
import sys

import pytest
import torch

from fastdiff.data import TextDataConfig, TokenizerConfig, load_text_data
from fastdiff.data.samples import SENTENCES_BETWEEN

CHARACTERS = TokenizerConfig("characters")
NUMBERS = TextDataConfig(name="numbers", sample="pairs", max_digits=3, num_pairs=200, held_out_fraction=0.1)


@pytest.fixture
def stories(tmp_path):
    """150 stories of four sentences, one per line."""
    path = tmp_path / "stories.jsonl"
    lines = [{"text": f"Tom had {i} cats. They slept. He woke them. All {i} ran."} for i in range(150)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def texts(data, file):
    return [data.tokenizer.decode(file.document(i)) for i in range(len(file))]


def test_pairs(cache):
    data = load_text_data(NUMBERS, CHARACTERS)
    assert (data.name, data.sample, len(data.train), len(data.held_out)) == ("numbers", "pairs", 180, 20)
    seen = []
    for part in (data.train, data.held_out):
        assert len(part.targets) == len(part.conditions)
        seen += zip(texts(data, part.conditions), texts(data, part.targets), strict=True)
    assert ("7", "seven") in seen and len(set(seen)) == 200  # nothing around prompts and answers


def test_documents(cache, stories):
    config = TextDataConfig(name="jsonl", path=str(stories), max_length=32)
    data = load_text_data(config, TokenizerConfig(vocab_size=330))
    assert (len(data.train), len(data.held_out), data.train.conditions) == (142, 8, None)
    found = []
    for part in (data.train, data.held_out):
        for i in range(len(part)):
            document = part.targets.document(i)
            assert document[-1] == data.tokenizer.eos_token_id and (document[:-1] > 4).all()
            found.append(data.tokenizer.decode(document[:-1]))
    assert sorted(found) == sorted(json.loads(line)["text"] for line in stories.read_text().splitlines())


def test_sentences(cache, stories):
    config = TextDataConfig(name="jsonl", path=str(stories), sample="first_and_last")
    data = load_text_data(config, CHARACTERS)
    index = texts(data, data.train.conditions).index(f"Tom had 5 cats.{SENTENCES_BETWEEN}All 5 ran.")
    assert texts(data, data.train.targets)[index] == " They slept. He woke them. "


def test_shakespeare(cache, three_works):
    data = load_text_data(TextDataConfig(path=str(three_works)), TokenizerConfig(vocab_size=600))
    assert (len(data.train), len(data.held_out), len(data.tokenizer)) == (3, 3, 600)
    share = data.held_out.targets.num_tokens / (data.train.targets.num_tokens + data.held_out.targets.num_tokens)
    assert 0.045 < share < 0.055  # seen: 0.051
    hamlet = data.tokenizer.decode(data.train.targets.document(0))
    assert hamlet.startswith("HAMLET, PRINCE OF DENMARK\n\nby William Shakespeare\n")
    assert data.tokenizer.decode(data.held_out.targets.document(0)[:-1]).endswith("is shot off.]")


def test_the_cache_is_used_again_and_follows_the_source(cache, stories, monkeypatch):
    config, tokenizer = TextDataConfig(name="jsonl", path=str(stories), max_length=32), TokenizerConfig(vocab_size=330)
    first = load_text_data(config, tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr("fastdiff.data.corpora.read_objects", None)  # the text is not read again
        again = load_text_data(config, tokenizer)
    assert again.fingerprint == first.fingerprint and again.train.targets.path == first.train.targets.path
    assert again.tokenizer("a cat")["input_ids"] == first.tokenizer("a cat")["input_ids"]

    os.utime(stories, (1, 1))  # written anew, with the same text: the same tokens, made again
    touched = load_text_data(config, tokenizer)
    assert touched.fingerprint == first.fingerprint and touched.train.targets.path != first.train.targets.path

    stories.write_text(stories.read_text().replace("149", "150"))
    fingerprints = {first.fingerprint, load_text_data(config, tokenizer).fingerprint}
    fingerprints.add(load_text_data(config, CHARACTERS).fingerprint)
    other = TextDataConfig(name="jsonl", path=str(stories), max_length=32, held_out_fraction=0.2)
    fingerprints.add(load_text_data(other, tokenizer).fingerprint)
    assert len(fingerprints) == 4


def test_lengths_of_windows_do_not_change_the_data(cache):
    first = load_text_data(NUMBERS, CHARACTERS)
    options = {**vars(NUMBERS), "min_length": 4, "max_length": 60, "length_format": "pad_fill"}
    again = load_text_data(TextDataConfig(**options), CHARACTERS)
    assert again.fingerprint == first.fingerprint and again.train.targets.path == first.train.targets.path


def test_a_tokenizer_that_is_there_already(cache, tmp_path):
    """A finished run's tokenizer, loaded from its folder, sees the data that it was trained with."""
    from transformers import AutoTokenizer

    first = load_text_data(NUMBERS, CHARACTERS)
    first.tokenizer.save_pretrained(tmp_path / "run")
    by_object = load_text_data(NUMBERS, AutoTokenizer.from_pretrained(tmp_path / "run"))
    by_name = load_text_data(NUMBERS, TokenizerConfig(str(tmp_path / "run")))
    assert by_object.fingerprint == by_name.fingerprint == first.fingerprint
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="tokenizer: it has no EoS token"):
        load_text_data(NUMBERS, tokenizer)


def test_long_prompts_are_left_out_and_counted(cache, tmp_path, capsys):
    lines = [{"prompt": "p" * n, "answer": f"{n}"} for n in range(21)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {"name": "jsonl", "path": str(tmp_path / "a.jsonl"), "sample": "pairs", "held_out_fraction": 0.3}
    data = load_text_data(TextDataConfig(**options, max_prompt_length=10), CHARACTERS)
    assert len(data.train) + len(data.held_out) == 10
    assert max(int(part.conditions.document_lengths.max()) for part in (data.train, data.held_out)) == 10
    message = capsys.readouterr().err
    assert "1 pairs with an empty prompt or answer, 10 pairs with prompts of more than 10 tokens" in message
    assert message.count("\n") == 1
    with pytest.raises(
        ValueError, match=r"leaves nothing in the part 'train' \(left out: .*more than 1 tokens"
    ) as error:
        load_text_data(TextDataConfig(**{**options, "path": long_prompts(tmp_path)}, max_prompt_length=1), CHARACTERS)
    assert "\n" not in str(error.value)
    assert len(list((cache / "tokens").glob("*jsonl*/"))) == 1  # and nothing of it is left


def long_prompts(folder):
    path = folder / "long.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"long {n}", "answer": "x"}) + "\n" for n in range(4)))
    return str(path)


def test_too_little_text_for_a_window(cache, tmp_path):
    (tmp_path / "a.txt").write_text("a few\nwords\n")
    config = TextDataConfig(name="text_folder", path=str(tmp_path), max_length=100)
    with pytest.raises(ValueError, match=r"part 'train' of .* has 7 tokens; .*max_length = 100"):
        load_text_data(config, CHARACTERS)


def test_a_cached_file_cut_short_is_named_and_one_removed_is_made_again(cache):
    first = load_text_data(NUMBERS, CHARACTERS)
    path = first.train.targets.path
    content = path.read_bytes()
    path.write_bytes(content[:-8])
    with pytest.raises(ValueError, match=f"{path} holds {len(content) - 8} bytes; .* delete it, and it is made again"):
        load_text_data(NUMBERS, CHARACTERS)
    path.unlink()
    again = load_text_data(NUMBERS, CHARACTERS)
    assert again.fingerprint == first.fingerprint and path.read_bytes() == content
    (path.parent / "meta.json").write_text("{")
    with pytest.raises(ValueError, match="meta.json is damaged; delete "):
        load_text_data(NUMBERS, CHARACTERS)


def test_an_interrupted_build_leaves_nothing(cache, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fastdiff.data.text.encode_texts", stop)
        with pytest.raises(KeyboardInterrupt):
            load_text_data(NUMBERS, CHARACTERS)
    left = [path.name for path in (cache / "tokens").iterdir() if not path.name.endswith(".lock")]
    assert left == []
    (lock,) = (cache / "tokens").iterdir()
    name = lock.name.removeprefix(".").removesuffix(".lock")
    killed = cache / "tokens" / f".writing-{name}"  # what a killed process leaves
    killed.mkdir()
    (killed / "train_targets.tokens").write_bytes(b"half")
    assert len(load_text_data(NUMBERS, CHARACTERS).train) == 180 and not killed.exists()


def test_two_processes_at_once(cache, stories):
    program = (
        "import sys; from fastdiff.data import TextDataConfig, TokenizerConfig, load_text_data\n"
        "print([name for name in ('transformers', 'tokenizers', 'datasets') if name in sys.modules])\n"
        "import transformers; print('ready', flush=True); input()\n"
        f"config = TextDataConfig(name='jsonl', path={str(stories)!r}, max_length=32)\n"
        "data = load_text_data(config, TokenizerConfig(vocab_size=330))\n"
        "print(data.fingerprint, data.train.targets.window(0, 32).tolist())"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "[]\n"  # importing fastdiff.data is light
        assert other.stdout.readline() == "ready\n"
        other.stdin.write("\n")
        other.stdin.flush()
        data = load_text_data(
            TextDataConfig(name="jsonl", path=str(stories), max_length=32), TokenizerConfig(vocab_size=330)
        )
        output = other.communicate()[0]
    assert other.returncode == 0
    assert output == f"{data.fingerprint} {data.train.targets.window(0, 32).tolist()}\n"
    assert len([path for path in (cache / "tokens").iterdir() if path.is_dir()]) == 1


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "file"))
    with pytest.raises(PermissionError, match="cannot be written .*; set FASTDIFF_CACHE to a folder") as error:
        load_text_data(NUMBERS, CHARACTERS)
    assert "\n" not in str(error.value)


def test_batches_of_a_corpus(cache):
    from fastdiff.data import pair_windows

    data = load_text_data(NUMBERS, CHARACTERS)
    tokenizer = data.tokenizer
    batch = pair_windows(data.held_out, torch.arange(4), 40, "eos_fill", tokenizer.eos_token_id, tokenizer.pad_token_id)
    for row in range(4):
        text = tokenizer.decode(batch.input_ids[row], skip_special_tokens=True)
        expected = (data.held_out.conditions.document(row), data.held_out.targets.document(row))
        assert text == "".join(tokenizer.decode(part) for part in expected)
