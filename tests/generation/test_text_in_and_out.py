"""Prompts and answers as training had them, ids without text, and samples that survive what reads them."""

import json
import os
import sys

import pytest
import torch
from language_runs import byte_tokenizer, tiny_model
from tokenizers_of_kinds import bert_like, gpt2_like, sentencepiece_like, with_holes

import fastdiff
from fastdiff import generate as command
from fastdiff.data import MASK_WORD, TextDataConfig, load_text_data
from fastdiff.data.text_parts import TextData, TextPart
from fastdiff.data.token_files import TokenFile, write_token_file
from fastdiff.data.tokenization import encode_texts, vocabulary_size
from fastdiff.generation import MaskedDiffusionGenerationConfig, TextGenerator, generate
from fastdiff.tasks.masked_lm.evaluate import exact_match
from fastdiff.tasks.masked_lm.run import save_model

KINDS = {"sentencepiece": sentencepiece_like, "bert": bert_like, "holes": with_holes}
WORDS = [("red", "cat"), ("cat red", "red cat"), ("cat", "red")]


def model_of(tokenizer, **options):
    fields = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("mask", "pad", "bos", "eos")}
    return tiny_model(vocabulary_size(tokenizer), **(fields | options))


def always(model, token):
    """The model with the same likeliest token everywhere."""
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.head_weight))
        model.model.norm.bias[:] = 1
        model.head_weight[token] = 1
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_those_of_training(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "cache"))
    file, tokenizer = tmp_path / "pairs.jsonl", KINDS[kind]()
    file.write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in WORDS))
    config = TextDataConfig(name="jsonl", path=str(file), sample="pairs", min_length=1, max_length=4)
    data = load_text_data(config, tokenizer)
    assert data.train.targets.vocab_size == vocabulary_size(tokenizer)
    generator = TextGenerator(model_of(tokenizer), tokenizer, MaskedDiffusionGenerationConfig(max_new_tokens=2))
    trained = [part.conditions.document(i).tolist() for part in (data.train, data.held_out) for i in range(len(part))]
    assert sorted(trained) == sorted(generator.encode([prompt for prompt, _ in WORDS]))


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_compared_as_tokens(kind, tmp_path):
    """Also where a decoded answer begins with a space, and where a token decodes to nothing."""
    tokenizer = KINDS[kind]()
    (cat,) = encode_texts(tokenizer, [" cat"])[0]
    prompts, answers = [encode_texts(tokenizer, [" red"])[0]] * 4, [[cat], [cat, tokenizer.unk_token_id], [cat], [cat]]
    parts = []
    for name, documents in (("answers", answers), ("prompts", prompts)):
        write_token_file(tmp_path / name, documents, vocabulary_size(tokenizer))
        parts.append(TokenFile.open(tmp_path / name))
    data = TextData("here", "pairs", TextPart(*parts), TextPart(*parts), tokenizer, "")
    generator = TextGenerator(
        always(model_of(tokenizer), cat), tokenizer, MaskedDiffusionGenerationConfig(max_new_tokens=1)
    )
    assert exact_match(generator, data, 4).accuracy == 3 / 4


@pytest.mark.parametrize("adds", [False, True])
def test_a_saved_folder_knows_what_training_added(adds, tmp_path):
    tokenizer = bert_like()
    save_model(tmp_path / "one", model_of(tokenizer, add_special_tokens=adds), tokenizer, {"max_new_tokens": 2})
    fastdiff.load(tmp_path / "one").save_pretrained(tmp_path / "two")
    run = fastdiff.load(tmp_path / "two")
    bare = tokenizer("red cat", add_special_tokens=False)["input_ids"]
    assert run.codec.encode_prompt("red cat") == [2] * adds + bare
    generator = TextGenerator(run.model, run.tokenizer, MaskedDiffusionGenerationConfig(max_new_tokens=2))
    assert generator.encode(["red cat", ""], unconditional=True) == [run.codec.encode("red cat"), run.codec.start]
    assert run.codec.start == ([2] if adds else [3])


def test_a_word_that_is_the_mask_token_stays():
    """Against a plain loop, at temperature 0: the surest of the places to fill first, then of the new tokens."""
    tokenizer = gpt2_like()
    (word,) = tokenizer(" mask")["input_ids"]
    model = model_of(tokenizer, mask_token_id=word, pad_token_id=None).double()
    generator = TextGenerator(model, tokenizer, MaskedDiffusionGenerationConfig(max_new_tokens=3))
    (row,) = generator.encode([" red mask <mask> cat mask"])
    ((only,),) = generator.generate([" red mask <mask> cat mask"], [row])
    ids = torch.tensor([[*generator.codec.as_seen(row), *[word] * 3]])
    open_ = torch.tensor([[token == word for token in row] + [True] * 3])
    in_prompt = torch.arange(ids.shape[1]) < len(row)
    while open_.any():
        logits = model(ids).logits.index_fill(-1, torch.tensor([word]), -torch.inf)
        probability, token = logits.softmax(-1).max(-1)
        block = open_ & in_prompt if (open_ & in_prompt).any() else open_
        place = probability.masked_fill(~block, -1).argmax()
        ids[0, place], open_[0, place] = token[0, place], False
    assert row.count(MASK_WORD) == 2 and row.count(word) == 1
    for options in ({}, {"prefix_cache": True, "cache_refresh_interval": 1}):
        config = MaskedDiffusionGenerationConfig(max_new_tokens=3, **options)
        assert torch.equal(generate(model, torch.tensor([row]), None, config).sequences, ids)
    assert only.filled == tokenizer.decode(ids[0, : len(row)]) and only.filled.count(" mask") == 2
    plain = generator.encode([" red mask"])  # nothing to fill: new text alone
    ((new,),) = generator.generate([" red mask"], plain)
    assert new.filled is None and len(new.tokens) == 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ids_without_text_are_never_drawn(temperature):
    """Of a padded vocabulary and of holes; end tokens and what fills a window need no text."""
    tokenizer = with_holes()
    model = always(tiny_model(60, eos_token_id=50, length_format="pad_fill", pad_token_id=0), 20)
    config = MaskedDiffusionGenerationConfig(max_new_tokens=32, temperature=temperature, seed=1, suppress_tokens=[7])
    generator = TextGenerator(model, tokenizer, config)
    assert set(generator.silent_token_ids) == set(range(60)) - {0, 1, 2, 3, 4, 7, 40, 50}
    rows = generator.encode(["red cat"])
    (samples,) = generator.generate(["red cat"], rows, num_samples=4, cut=False)
    drawn = {token for sample in samples for token in sample.tokens}
    assert drawn <= {0, 1, 2, 4, 40, 50} and (temperature == 0 or len(drawn) > 3)
    assert generator.config.suppress_tokens == [7]  # what was asked for stays as it is


# ---------------------------------------------------------------------------------------------- the command


@pytest.fixture
def saved(tmp_path):
    tokenizer = byte_tokenizer()
    save_model(tmp_path / "saved", tiny_model(len(tokenizer)), tokenizer, {"max_new_tokens": 4})
    return tmp_path / "saved"


def prompts_in(records):
    return [record["prompt"] for record in map(json.loads, records.read_text().splitlines())]


@pytest.mark.parametrize(("name", "content"), [
    ("a.txt", "\ufeffto be\r\n\r\n  \nor\n\n"),
    ("a.jsonl", '\ufeff{"prompt": "to be"}\n\n{"prompt": "or"}\n \n'),
])  # fmt: skip
def test_prompt_files_with_a_mark_and_blank_lines(saved, tmp_path, capsys, name, content):
    (tmp_path / name).write_text(content, newline="")
    command.main([str(saved), "--prompt-file", str(tmp_path / name), "--output", str(tmp_path / "out.jsonl")])
    assert prompts_in(tmp_path / "out.jsonl") == ["to be", "or"]


def test_finished_samples_survive_a_reader_that_goes(saved, tmp_path, monkeypatch, capfd):
    reading, writing = os.pipe()
    os.close(reading)
    output = tmp_path / "out.jsonl"
    output.write_text("old\n")
    with open(writing, "w") as closed, pytest.raises(SystemExit) as exit_:
        monkeypatch.setattr(sys, "stdout", closed)
        command.main([str(saved), "--prompt", "a", "--num-samples", "5", "--batch-size", "2", "--output", str(output)])
    monkeypatch.undo()
    assert exit_.value.code == 1 and prompts_in(output) == ["a", "a"]  # the batch that was done
    assert capfd.readouterr().err == f"the output was closed; 2 finished samples are in {output}\n"


@pytest.mark.parametrize("watch", [[], ["--watch"]])
def test_a_terminal_of_few_characters_is_no_error(saved, tmp_path, monkeypatch, watch):
    output, text = tmp_path / "out.jsonl", tmp_path / "text"
    with open(text, "w", encoding="latin-1") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        command.main([str(saved), "--prompt", "é 你好", *watch, "--output", str(output)])
    monkeypatch.undo()
    shown = text.read_bytes().decode("latin-1")
    assert r"é \u4f60\u597d" in shown and prompts_in(output) == ["é 你好"]
    assert ("] é " in shown and "__" in shown) == bool(watch)


@pytest.mark.parametrize("watch", [[], ["--watch"]])
def test_what_a_terminal_obeys_is_shown(saved, capsys, watch):
    """In the prompt, which is shown as generated text is: CSI, OSC and the mark that turns the order of letters."""
    command.main([str(saved), "--prompt", "a\x9b31m\x9d\u202eb\x1b[2J", *watch])
    printed = capsys.readouterr().out
    assert printed.count(r"a\x9b31m\x9d\u202eb\x1b[2J") == 1 + 2 * bool(watch)  # steps 1 and 4
    assert not {"\x9b", "\x9d", "\u202e", "\x1b"} & set(printed)


def test_filled_gaps_need_no_new_text(saved, capsys):
    command.main([str(saved), "--prompt", "a<mask>b", "--max-new-tokens", "0"])
    assert capsys.readouterr().err == ""
    with pytest.raises(SystemExit):
        command.main([str(saved), "--prompt", "a\udcff"])
    assert "error: prompt 1: text: got half of a surrogate pair" in capsys.readouterr().err


def test_records_are_added_whole_or_not_at_all(tmp_path, monkeypatch):
    from fastdiff.files import RecordFile

    path = tmp_path / "records.jsonl"
    path.write_text("old\n")
    records = RecordFile(path)
    assert path.read_text() == "old\n"
    records.add([{"text": "é"}, {"text": "\ud800"}])
    records.add([{"text": "b"}])
    assert [json.loads(line)["text"] for line in path.read_text().splitlines()] == ["é", "\ud800", "b"]
    whole = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastdiff.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left on device") as error:
        records.add([{"text": "c"}])
    assert path.read_bytes() == whole and error.value.filename == str(path) and records.count == 3
