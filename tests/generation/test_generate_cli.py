"""`python -m fastdiff.generate` and what it is made of: loading, prompts, copies, output, errors of one line."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from language_runs import byte_tokenizer, tiny_model, write_run
from transformers.utils import logging

from fastdiff import generate as command
from fastdiff import sample
from fastdiff.generation import MaskedDiffusionGenerationConfig, generate
from fastdiff.generation.text import StepRecorder, TextGenerator, until_end
from fastdiff.tasks.masked_lm.run import load_language_model
from fastdiff.visualization.terminal import printable

MASK, EOS = 3, 2


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def output_of(capsys, *arguments) -> list[str]:
    command.main([str(a) for a in arguments])
    return capsys.readouterr().out.rstrip("\n").split("\n")


def failure(capsys, *arguments, main=command.main) -> str:
    with pytest.raises(SystemExit) as exit_:
        main([str(a) for a in arguments])
    text = capsys.readouterr().err.strip()
    assert exit_.value.code == 2 and text.startswith("error: ") and "\n" not in text
    return text


def save_model(folder, model, tokenizer):
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# ---------------------------------------------------------------------------------------------- loading


def test_a_run_gives_its_newest_averaged_weights(language_run):
    loaded = load_language_model(language_run, device="cpu")
    assert loaded.step == 3 and loaded.folder.path == language_run and loaded.recipe.task == "masked_lm"
    assert not loaded.model.training and loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    size = len(loaded.tokenizer)
    for options, seed in (({}, 103), ({"weights": "model"}, 3)):
        expected = tiny_model(size, seed).state_dict()
        got = load_language_model(language_run, device="cpu", **options).model.state_dict()
        assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in got)
    older = load_language_model(language_run / "checkpoints" / "step_2", device="cpu")
    assert older.step == 2 and older.recipe == loaded.recipe
    assert older.tokenizer("to be")["input_ids"] == byte_tokenizer()("to be")["input_ids"]
    assert load_language_model(language_run, device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16


def test_a_checkpoint_taken_out_of_its_run(language_run, tmp_path):
    moved = shutil.copytree(language_run / "checkpoints" / "step_3", tmp_path / "taken")
    loaded = load_language_model(moved, device="cpu")
    assert loaded.step == 3 and loaded.recipe is None and loaded.folder is None
    expected = load_language_model(language_run, device="cpu").model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.model.state_dict().items())


def test_a_folder_of_a_published_format(tmp_path):
    """GPT-2's layout, whose tokenizer has no mask token."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = byte_tokenizer(mask_token=None, pad_token=None)
    torch.manual_seed(0)
    fields = dict(vocab_size=len(tokenizer), n_positions=32, n_embd=16, n_layer=1, n_head=2)
    gpt2 = GPT2LMHeadModel(GPT2Config(**fields, bos_token_id=1, eos_token_id=EOS, mask_token_id=270))
    loaded = load_language_model(save_model(tmp_path / "gpt2", gpt2, tokenizer), device="cpu")
    assert loaded.step is None and loaded.model.config.architecture == "gpt2"
    text = TextGenerator(loaded.model, loaded.tokenizer, MaskedDiffusionGenerationConfig(max_new_tokens=4))
    (ids,) = text.encode(["to <mask><mask> be"])
    assert ids.count(270) == 2 and ids == tokenizer("to ")["input_ids"] + [270, 270] + tokenizer(" be")["input_ids"]
    ((only,),) = text.generate(["to <mask><mask> be"], [ids])
    assert only.filled.startswith("to ") and only.filled.endswith(" be") and "<mask>" not in only.filled
    assert loaded.tokenizer.mask_token is None  # it is not changed


def test_dreams_tokenizer_needs_no_code_of_its_repository(tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    words = ["Ġ", "a", "b", "ab", "<|mask|>", "<|endoftext|>"]
    fields = dict(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    Qwen2ForCausalLM(Qwen2Config(**fields, num_key_value_heads=1, tie_word_embeddings=False)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "Dream", "architectures": ["DreamModel"], "auto_map": {"AutoModel": "dream.DreamModel"}}
    config |= {"mask_token_id": 4, "pad_token_id": 5, "bos_token_id": 5, "eos_token_id": 5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    own = {"tokenizer_class": "DreamTokenizer", "mask_token": "<|mask|>",
           "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}}  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(own))
    loaded = load_language_model(tmp_path, device="cpu")
    assert loaded.model.config.architecture == "dream"
    assert loaded.tokenizer("ab<|mask|>a")["input_ids"] == [3, 4, 1]


def test_what_cannot_be_loaded(language_run, tmp_path, capsys):
    def fails(path):
        return failure(capsys, path, "--prompt", "x")

    assert "no config.yaml and no config.json in it" in fails(tmp_path)
    assert "could not be downloaded from the Hugging Face Hub" in fails("nobody/nothing")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    assert re.search(r"a model of type 'bert'; expected one of .*GPT-2.*llada", fails(tmp_path / "bert"))
    few = save_model(tmp_path / "few", tiny_model(100), byte_tokenizer())
    assert "its tokenizer has ids up to 279, its model 100 ids" in fails(few)
    save_model(tmp_path / "none", tiny_model(300), byte_tokenizer())
    for file in (tmp_path / "none").glob("tokenizer*"):
        file.unlink()
    assert "no tokenizer that can be loaded" in fails(tmp_path / "none")
    cut = shutil.copytree(language_run, tmp_path / "cut")
    weights = cut / "checkpoints" / "step_3" / "ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert "it was cut short; delete" in fails(cut)
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(language_run / "config.yaml", empty)
    assert "has no checkpoint yet" in fails(empty)
    (empty / "config.yaml").write_text("model: {depth: 2}")
    assert "use fastdiff.sample or fastdiff.evaluate" in fails(empty)
    assert "use fastdiff.generate or fastdiff.evaluate" in failure(capsys, language_run, main=sample.main)


# ---------------------------------------------------------------------------------------------- generating


def test_the_command_prints_text_and_what_it_cost(language_run, capsys):
    options = ["--prompt", "to be", "--seed", "1", "--temperature", "0.7"]
    lines = output_of(capsys, language_run, *options)
    assert lines[0].startswith("to be")
    assert re.fullmatch(r"12 tokens in \d+\.\d s \(\d+ tokens/s\), 12 forward passes", lines[-1])  # as the recipe says
    assert output_of(capsys, language_run, *options)[:-1] == lines[:-1]
    assert output_of(capsys, language_run, *options[:3], "2", *options[4:])[:-1] != lines[:-1]
    short = output_of(capsys, language_run, *options, "--max-new-tokens", 6, "--num-inference-steps", 2)
    assert short[-1].startswith("6 tokens") and short[-1].endswith("2 forward passes")


def test_output_has_each_sample_whatever_the_batch(language_run, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("to be", "or not to be", "to be")))
    options = [language_run, "--prompt-file", prompts, "--num-samples", 2, "--temperature", 1, "--seed", 4]
    records = []
    for batch in (1, 4, 16):
        path = tmp_path / f"{batch}.jsonl"
        lines = output_of(capsys, *options, "--batch-size", batch, "--output", path)
        assert lines[-1].endswith(f"; written to {path}") and "--- prompt 3, sample 2" in lines
        records.append([json.loads(line) for line in path.read_text().splitlines()])
    assert records[0] == records[1] == records[2] and len(records[0]) == 6
    first = records[0][0]
    assert first["prompt"] == "to be" and first["seed"] == 4 and first["options"]["max_new_tokens"] == 12
    assert len({record["text"] for record in records[0]}) == 6  # copies of a prompt, and the prompt given twice, differ
    again = output_of(capsys, language_run, "--prompt", "to be", "--temperature", 1, "--seed", first["seed"])
    assert again[0] == printable("to be" + first["text"]).split("\n")[0]


def test_samples_are_those_of_generate(language_run):
    loaded = load_language_model(language_run, device="cpu")
    config = MaskedDiffusionGenerationConfig(max_new_tokens=8, temperature=1.0, seed=5)
    text = TextGenerator(loaded.model, loaded.tokenizer, config)
    rows = text.encode(["to be"])
    ((one, two),) = text.generate(["to be"], rows, num_samples=2)
    expected = generate(loaded.model, torch.tensor(rows * 2), None, config).sequences[:, len(rows[0]) :]
    assert [one.tokens, two.tokens] == [row[: row.index(EOS)] if EOS in row else row for row in expected.tolist()]
    assert text.statistics.tokens == 16 and text.statistics.forward_passes == 8


def test_text_ends_at_the_first_end_token(language_run):
    loaded = load_language_model(language_run, device="cpu")
    text = TextGenerator(loaded.model, loaded.tokenizer, MaskedDiffusionGenerationConfig(max_new_tokens=6))
    with torch.no_grad():
        loaded.model.head_weight[:] = 0
        loaded.model.model.norm.bias[:] = 1
        loaded.model.head_weight[EOS] = 1
    (ids,) = text.encode(["to be"])
    ((only,),) = text.generate(["to be"], [ids])
    assert only.text == "" and only.tokens == [] and only.steps is None
    ((whole,),) = text.generate(["to be"], [ids], cut=False)
    assert whole.text == "" and whole.tokens == [EOS] * 6


def test_recorded_steps_are_those_that_chose_each_token(language_run):
    loaded = load_language_model(language_run, device="cpu")
    config = MaskedDiffusionGenerationConfig(
        max_new_tokens=8, block_length=4, num_inference_steps=4, temperature=1.0, seed=5
    )
    text = TextGenerator(loaded.model, loaded.tokenizer, config)
    prompts = ["to be", "that is the question"]
    seen = []

    def streamer(ids, mask):
        return lambda token_ids, step: seen.append(token_ids[:, ids.shape[1] :] != text.mask_token_id)

    (samples,) = text.generate(prompts, text.encode(prompts), cut=False, record_steps=True, streamer=streamer)
    for row, drawn in enumerate(samples):
        assert sorted(drawn.steps) == [0, 0, 1, 1, 2, 2, 3, 3] and max(drawn.steps[:4]) == 1
        for step, chosen in enumerate(seen):  # the other streamer sees every step, too
            assert chosen[row].tolist() == [number <= step for number in drawn.steps]
    assert len(seen) == 4


def test_steps_of_positions_that_are_masked_again():
    recorder = StepRecorder(mask_token_id=9)
    for step, ids in enumerate([[[1, 9, 2]], [[1, 3, 9]], [[1, 3, 4]]]):
        recorder(torch.tensor(ids), step)
    assert recorder.steps.tolist() == [[0, 1, 2]]


def test_pieces_of_tokens_that_share_a_character(language_run):
    loaded = load_language_model(language_run, device="cpu")
    text = TextGenerator(loaded.model, loaded.tokenizer, MaskedDiffusionGenerationConfig(max_new_tokens=4))
    tokens = loaded.tokenizer("aé", add_special_tokens=False)["input_ids"] + [EOS]
    assert len(tokens) == 4 and text.pieces(tokens) == ["a", "", "é", loaded.tokenizer.eos_token]


def test_infilling_and_beginning_from_nothing(language_run, capsys):
    lines = output_of(capsys, language_run, "--prompt", "To be, <mask><mask> not", "--max-new-tokens", 0)
    assert re.fullmatch(r"To be, .* not", lines[0]) and "<mask>" not in lines[0] and lines[-1].startswith("2 tokens")
    (_, closing) = output_of(capsys, language_run, "--unconditional")[-2:]
    assert closing.startswith("12 tokens")


def test_prompts_of_an_encoder(tmp_path, capsys):
    run = write_run(tmp_path / "run", steps=(1,), num_encoder_layers=1)
    loaded = load_language_model(run, device="cpu")
    config = MaskedDiffusionGenerationConfig(max_new_tokens=6, seed=1, temperature=1.0)
    text = TextGenerator(loaded.model, loaded.tokenizer, config)
    prompts = ["to be", "that is the question"]
    rows = text.encode(prompts)
    (answers,) = text.generate(prompts, rows)
    for answer, ids in zip(answers, rows, strict=True):
        start = torch.tensor([[1]])  # BoS
        alone = generate(loaded.model, start, None, config, encoder_input_ids=torch.tensor([ids])).sequences[0, 1:]
        assert answer.tokens == until_end(alone.tolist(), [EOS])
    lines = output_of(capsys, run, "--prompt", "to be", "--max-new-tokens", 47, "--block-length", 47)
    assert lines[0] == "to be" and lines[-1].startswith("47 tokens")
    too_many = ["--max-new-tokens", 48, "--block-length", 48]  # BoS is one of the 48 positions
    assert "max_new_tokens is 48; expected at most 48 together" in failure(capsys, run, "--prompt", "to be", *too_many)
    assert "this model's prompts go through an encoder" in failure(capsys, run, "--prompt", "<mask> be")
    assert "prompt 1: got no text" in failure(capsys, run, "--unconditional")


def test_stop_strings_and_caches(language_run, capsys):
    options = ["--prompt", "to be", "--seed", 1, "--temperature", 1, "--block-length", 2]
    whole = output_of(capsys, language_run, *options)[0].removeprefix("to be")
    stop = whole[3]
    cut = output_of(capsys, language_run, *options, "--stop-strings", stop)[0].removeprefix("to be")
    assert stop in cut and len(cut) < len(whole)
    exact = output_of(capsys, language_run, *options, "--dual-cache", "--cache-refresh-interval", 1)
    assert exact[0].removeprefix("to be") == whole  # refreshed at each step it is exact
    assert "prefix_cache" in failure(capsys, language_run, *options, "--dual-cache", "--prefix-cache")


def test_chat_template(tmp_path, capsys):
    tokenizer = byte_tokenizer()
    model = tiny_model(len(tokenizer))
    folder = save_model(tmp_path / "plain", model, tokenizer)
    assert "this tokenizer has no chat template" in failure(capsys, folder, "--prompt", "hi", "--chat")
    tokenizer.chat_template = "<bos>{% for m in messages %}{{ m.content }}|{% endfor %}"
    loaded = load_language_model(save_model(tmp_path / "chat", model, tokenizer), device="cpu")
    text = TextGenerator(loaded.model, loaded.tokenizer, MaskedDiffusionGenerationConfig(max_new_tokens=4))
    assert text.encode(["hi"], chat=True) == [tokenizer("<bos>hi|")["input_ids"]]
    lines = output_of(capsys, tmp_path / "chat", "--prompt", "hi", "--chat", "--max-new-tokens", 4)
    assert lines[0] == "hi"


def test_options_are_the_fields_of_the_configuration(capsys, language_run):
    with pytest.raises(SystemExit):
        command.main([str(language_run), "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in MaskedDiffusionGenerationConfig.option_defaults():
        assert f"--{name.replace('_', '-')} " in text or f"--{name.replace('_', '-')}," in text
    assert "Classifier-free guidance, logits = u + scale" in text and "(default: 64)" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "prompt: got none; expected --prompt TEXT"),
        (["--prompt", ""], r"prompt 1: got no text; expected at least one token, or unconditional"),
        (["--prompt", "a" * 40], r"prompt 1: got 40 tokens, and max_new_tokens is 12; expected at most 48 together"),
        (["--prompt", "a", "--prompt", "b" * 60, "--max-new-tokens", "0"], "prompt 1: got no mask token <mask>"),
        (["--prompt", "<mask>" + "b" * 60, "--max-new-tokens", "0"], "prompt 1: got 61 tokens"),
        (["--prompt", "a", "--block-length", "0"], "block_length: got 0; expected an int of 1 or more"),
        (["--prompt", "a", "--num-inference-steps", "0"], "num_inference_steps: got 0; expected an int of 1"),
        (["--prompt", "a", "--temperature", "-1"], "temperature: got -1.0"),
        (["--prompt", "a", "--temperature", "warm"], "--temperature: got warm; expected a number"),
        (["--prompt", "a", "--unmasking-rule", "all"], "--unmasking-rule: got 'all'; expected one of 'count'"),
        (["--prompt", "a", "--threshold", "0.9"], "threshold: got 0.9 with unmasking_rule='count'"),
        (["--prompt", "a", "--suppress-tokens", "280"], "suppress_tokens: got 280; expected 0 to 279"),
        (["--prompt", "a", "--num-samples", "0"], "--num-samples: got 0; expected at least 1"),
        (["--prompt", "a", "--device", "cuda:99"], "device: got 'cuda:99'; expected cpu"),
        (["--prompt", "a", "--dtype", "int8"], "dtype: got 'int8'; expected float32"),
        (["--prompt", "a", "--output", "/nowhere/x.jsonl"], "lies in a folder that does not exist"),
        (["--prompt", "a", "--seeed", "1"], "nrecognized"),
        (["--prompt-file", "/nowhere.txt"], "--prompt-file: got '/nowhere.txt', which is not a file"),
    ],
)
def test_bad_options(language_run, capsys, arguments, message):
    assert re.search(message, failure(capsys, language_run, *arguments))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9", r"a.txt: not UTF-8 at byte 3"),
        ("a.txt", b"", "prompt: got none"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": 3}\n', r"a.jsonl, line 2: expected an object with the text field"),
        ("a.jsonl", b'{"prompt": "x"', r"a.jsonl, line 1: not JSON"),
    ],
)
def test_bad_prompt_files(language_run, tmp_path, capsys, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert re.search(message, failure(capsys, language_run, "--prompt-file", tmp_path / name))


def test_a_rule_on_the_command_line_drops_the_recipes_numbers(tmp_path, capsys):
    options = {"max_new_tokens": 6, "unmasking_rule": "threshold", "threshold": 0.5}
    run = write_run(tmp_path / "run", generation=options, steps=(1,))
    assert "6 tokens" in output_of(capsys, run, "--prompt", "a")[-1]
    assert output_of(capsys, run, "--prompt", "a", "--unmasking-rule", "count")[-1].endswith("6 forward passes")


def test_fewer_tokens_than_the_recipes_block(tmp_path, capsys):
    run = write_run(tmp_path / "run", generation={"max_new_tokens": 24, "block_length": 8}, steps=(1,))
    assert "5 tokens" in output_of(capsys, run, "--prompt", "a", "--max-new-tokens", "5")[-1]
    assert "13 tokens" in output_of(capsys, run, "--prompt", "a", "--max-new-tokens", "13")[-1]
    last = output_of(capsys, run, "--prompt", "a", "--max-new-tokens", "10", "--num-inference-steps", "3")[-1]
    assert "10 tokens" in last and last.endswith("4 forward passes")  # two blocks of 3 / 2 steps, rounded up


def test_no_text_is_missed_where_no_new_tokens_were_asked_for(language_run, tmp_path, capsys):
    arguments = [language_run, "--prompt", "to <mask><mask>e", "--max-new-tokens", "0"]
    command.main([str(a) for a in arguments])
    assert "no text" not in capsys.readouterr().err
    model = load_language_model(language_run, device="cpu").model
    with torch.no_grad():
        model.head_weight.zero_()
        model.head_weight[EOS] += 1  # every state's likeliest token, or its least likely: one of the two is EoS
    folder = save_model(tmp_path / "ending", model, byte_tokenizer())
    suppressed = [str(token) for token in range(len(byte_tokenizer())) if token not in (EOS, MASK)]
    command.main([str(folder), "--prompt", "to", "--max-new-tokens", "3", "--suppress-tokens", *suppressed])
    assert capsys.readouterr().err == "(no text: it begins with an end token)\n"


def test_ctrl_c_ends_in_one_line(tmp_path):
    """The lines of 580 masks are more than a pipe holds, so the command cannot end before it is interrupted."""
    tokenizer = byte_tokenizer()
    model = tiny_model(len(tokenizer), max_position_embeddings=600)
    folder, output = save_model(tmp_path / "model", model, tokenizer), tmp_path / "out.jsonl"
    arguments = [folder, "--prompt", "to be", "--max-new-tokens", 580, "--watch", "--output", output]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastdiff.generate", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        # a shell's background job ignores Ctrl-C, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout.readline().startswith("[step 1, ")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130 and errors.strip() == "interrupted"
    assert not output.exists()


def test_finished_samples_survive_ctrl_c(language_run, tmp_path, capsys, monkeypatch):
    original, calls = TextGenerator._batch, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(TextGenerator, "_batch", interrupted)
    path = tmp_path / "out.jsonl"
    with pytest.raises(SystemExit) as exit_:
        command.main(
            [str(language_run), "--prompt", "a", "--num-samples", "5", "--batch-size", "1", "--output", str(path)]
        )
    assert exit_.value.code == 130 and len(path.read_text().splitlines()) == 2
    assert capsys.readouterr().err == f"interrupted; 2 finished samples are in {path}\n"


def test_copies_may_be_spread_over_calls(language_run):
    model = load_language_model(language_run, device="cpu").model
    config = MaskedDiffusionGenerationConfig(max_new_tokens=8, temperature=1.0, seed=5)
    prompt = torch.tensor([[9, 8, 7]])
    together = generate(model, prompt.repeat(3, 1), None, config).sequences
    alone = [generate(model, prompt, None, config, copies=[copy]).sequences[0] for copy in range(3)]
    assert torch.equal(together, torch.stack(alone)) and not torch.equal(alone[0], alone[1])
    with pytest.raises(ValueError, match=r"copies: got \[0, 1\]; expected 1 numbers"):
        generate(model, prompt, None, config, copies=[0, 1])
