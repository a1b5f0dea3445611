"""The lm-eval adapter: its numbers against enumeration, and local tasks of each request type through the command."""

import functools
import json
import math
import re
import sys

import pytest
import torch
import yaml
from evaluation.enumerated import exact, expected_sum
from language_runs import byte_tokenizer, tiny_model
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from tokenizers_of_kinds import bert_like

from fastdiff import evaluate
from fastdiff.generation import MaskedDiffusionGenerationConfig, generate
from fastdiff.generation.text import TextGenerator
from fastdiff.integrations.lm_eval import FastdiffLM

ROWS = [
    {"question": "to be", "answer": " or not", "choices": [" or", " not to"], "label": 1},
    {"question": "that is", "answer": " the", "choices": [" the", " be"], "label": 0},
    {"question": "the question", "answer": " is", "choices": [" q", " is that"], "label": 1},
]
METRICS = {
    "multiple_choice": ["acc"],
    "loglikelihood": ["perplexity", "acc"],
    "loglikelihood_rolling": ["word_perplexity", "bits_per_byte"],
    "generate_until": ["exact_match"],
}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="module")
def model():
    return tiny_model(280).double()


def adapter(model, num_draws=64, batch_size=16, config=None, **options):
    return FastdiffLM(model, byte_tokenizer(), config, num_draws=num_draws, batch_size=batch_size, **options)


def requests(*arguments):
    return [Instance("loglikelihood", {}, each, i) for i, each in enumerate(arguments)]


def test_loglikelihood_is_minus_the_bound_of_the_continuation(model):
    harness, tokenizer = adapter(model, num_draws=3000, batch_size=500), byte_tokenizer()
    pairs = [("to be", " or"), ("that is", " the question"), ("", "to be or"), ("to be ", "or")]
    got = harness.loglikelihood(requests(*pairs), disable_tqdm=True)
    for (context, continuation), (value, _) in zip(pairs, got, strict=True):
        before = tokenizer(context.rstrip())["input_ids"] or [2]  # the end token
        ids = torch.tensor(before + tokenizer(context + continuation)["input_ids"][len(before) if context else 0 :])
        maskable = torch.arange(len(ids)) >= len(before)
        truth = -expected_sum(model, ids, maskable, None)
        # observed at most 2 %; a token's draws are one and the same
        assert value == pytest.approx(truth, rel=1e-9 if int(maskable.sum()) == 1 else 0.06)
    assert got[0][0] != got[1][0]


def test_requests_do_not_depend_on_each_other(model):
    pairs = [("to be", " or not"), ("that is the", " question"), ("that", " is"), ("to be", " or not")]
    one = adapter(model, batch_size=1).loglikelihood(requests(*pairs), disable_tqdm=True)
    other = adapter(model, batch_size=7).loglikelihood(requests(*pairs[::-1]), disable_tqdm=True)[::-1]
    assert [value for value, _ in one] == pytest.approx([value for value, _ in other], rel=1e-9)
    assert one[0] == one[3] and [same for _, same in one] == [same for _, same in other]


def test_is_greedy_is_decoding_at_temperature_zero(model):
    tokenizer = byte_tokenizer()
    context = tokenizer("to be")["input_ids"]
    config = MaskedDiffusionGenerationConfig(max_new_tokens=3)
    decoded = generate(model, torch.tensor([context]), None, config).sequences[0, len(context) :].tolist()
    other = decoded[:-1] + [decoded[-1] % 200 + 5]
    lm = adapter(model, num_draws=2)
    results = lm._loglikelihood_tokens([(None, context, decoded), (None, context, other), (None, context, [])], True)
    assert [same for _, same in results] == [True, False, True] and results[2][0] == 0


def test_rolling_texts_are_cut_into_windows(model):
    harness, tokenizer = adapter(model, num_draws=200), byte_tokenizer()
    text = "to be, or not to be, that is the question: " * 4
    tokens = tokenizer(text)["input_ids"]
    assert len(tokens) > 2 * model.config.max_position_embeddings
    short, long, empty = harness.loglikelihood_rolling(requests(("to be",), (text,), ("",)), disable_tqdm=True)
    assert long < 10 * short < 0 and empty == 0
    pieces, size = [], model.config.max_position_embeddings - 1
    for start in range(0, len(tokens), size):
        end = min(start + size, len(tokens))
        before = tokens[end - size - 1 : start] if start else [2]  # the last window sees more of what is before it
        pieces.append((None, before, tokens[start:end]))
    assert long == pytest.approx(sum(v for v, _ in harness._loglikelihood_tokens(pieces, True, False)), rel=1e-9)


def test_generate_until_cuts_the_text(model):
    config = MaskedDiffusionGenerationConfig(max_new_tokens=12, num_inference_steps=6, block_length=6)
    harness = adapter(model, config=config)
    texts = []
    for new in (15, 18):  # three blocks of three steps, the last one of 3 tokens or of 6
        text = TextGenerator(model, byte_tokenizer(), MaskedDiffusionGenerationConfig(
            max_new_tokens=new, num_inference_steps=9, block_length=6, seed=0))  # fmt: skip
        ((answer,),) = text.generate(["to be"], text.encode(["to be"]))
        texts.append(answer.text)
    stop = texts[1][4]
    asked = [("to be", {"until": [], "max_gen_toks": 15}), ("to be", {"until": [stop], "max_gen_toks": 18})]
    assert harness.generate_until(requests(*asked), disable_tqdm=True) == [texts[0], texts[1].split(stop)[0]]


def test_a_temperature_of_0_is_0(model):
    """With do_sample and without: 0 is greedy; no temperature samples at 1."""
    harness = adapter(model, config=MaskedDiffusionGenerationConfig(max_new_tokens=8))
    greedy, zero, sampled = (
        harness.generate_until(requests(("to be", options)), disable_tqdm=True)
        for options in ({}, {"do_sample": True, "temperature": 0.0}, {"do_sample": True})
    )
    assert greedy == zero != sampled
    temperatures = [harness._config({"do_sample": True, "temperature": t}, 8).temperature for t in (0.0, 0, 0.5, None)]
    assert temperatures == [0.0, 0.0, 0.5, 1.0]


def test_guidance_holds_for_likelihoods(model):
    """LLaDA's evaluation: logits of the prompt against those without, for a choice's likelihood and whether it wins."""
    config = MaskedDiffusionGenerationConfig(max_new_tokens=2, guidance_scale=2.0)
    harness, tokenizer = adapter(model, num_draws=2000, batch_size=500, config=config), byte_tokenizer()
    context, continuation = tokenizer("to be")["input_ids"], tokenizer(" or")["input_ids"]
    decoded = generate(model, torch.tensor([context]), None, config).sequences[0, len(context) :].tolist()
    asked = [(None, context, continuation), (None, context, decoded)]
    (value, _), (_, greedy) = harness._loglikelihood_tokens(asked, True)
    ids = torch.tensor(context + continuation)
    truth = -expected_sum(model, ids, torch.arange(len(ids)) >= len(context), None, cfg=1.0)
    assert value == pytest.approx(truth, rel=0.06) and greedy


def test_long_contexts_lose_their_beginning(model):
    harness = adapter(model, num_draws=4)
    longest = model.config.max_position_embeddings
    context = [10 + i % 200 for i in range(2 * longest)]
    (long, _), (cut, _) = harness._loglikelihood_tokens(
        [(None, context, [20, 30]), (None, context[-longest + 2 :], [20, 30])], True
    )
    assert long == cut
    assert harness.generate_until(requests(("be " * 100, {"max_gen_toks": 10})), disable_tqdm=True)
    with pytest.raises(ValueError, match=f"continuation: got {2 * longest} tokens; expected at most {longest}"):
        harness._loglikelihood_tokens([(None, [], context)], True)


def test_an_encoder_sees_the_context():
    model = tiny_model(280, num_encoder_layers=1).double()
    harness, tokenizer = adapter(model, num_draws=2), byte_tokenizer()
    pairs = [("to be", "t"), ("that is the question", "t")]
    got = harness.loglikelihood(requests(*pairs), disable_tqdm=True)
    (token,) = tokenizer("t")["input_ids"]
    for (context, _), (value, _) in zip(pairs, got, strict=True):
        with torch.no_grad():
            states = model.encode(torch.tensor([tokenizer(context)["input_ids"]]))
        ids, maskable = torch.tensor([1, token]), torch.tensor([False, True])
        truth = -expected_sum(model, ids, maskable, None, encoder_hidden_states=states)
        assert value == pytest.approx(truth, rel=1e-9)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with a task of each output type."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for kind, metrics in METRICS.items():
        task = {
            "task": f"local_{kind}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "output_type": kind,
            "doc_to_text": "" if kind == "loglikelihood_rolling" else "{{question}}",
            "doc_to_target": "{{question}}{{answer}}" if kind == "loglikelihood_rolling" else "{{answer}}",
            "metric_list": [{"metric": metric} for metric in metrics],
        }
        if kind == "multiple_choice":
            task |= {"doc_to_choice": "choices", "doc_to_target": "label", "target_delimiter": ""}
        if kind == "generate_until":
            task["generation_kwargs"] = {"until": ["\n"], "max_gen_toks": 6}
        (folder / f"{kind}.yaml").write_text(yaml.safe_dump(task))
    return folder


def test_local_tasks_of_each_kind_through_the_command(tasks, language_run, tmp_path, capsys):
    names = ",".join(f"local_{kind}" for kind in METRICS)
    output = tmp_path / "scores.json"
    arguments = ["--no-held-out", "--lm-eval", names, "--lm-eval-include-path", str(tasks), "--draws", "8"]
    evaluate.main([str(language_run), *arguments, "--output", str(output)])
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith(f"step 3, ema weights; written to {output}")
    scores = json.loads(output.read_text())
    assert scores["step"] == 3 and scores["lm_eval"]["draws"] == 8
    for kind, metrics in METRICS.items():
        for metric in metrics:
            value = scores["lm_eval"]["results"][f"local_{kind}"][f"{metric},none"]
            assert math.isfinite(value) and value >= 0
            assert f"local_{kind}" in printed and metric in printed
    assert "likelihood" not in scores
    limited = [*arguments, "--limit", "1", "--output", str(output)]
    evaluate.main([str(language_run), *limited[:2], "local_multiple_choice", *limited[3:]])
    assert set(json.loads(output.read_text())["lm_eval"]["results"]) == {"local_multiple_choice"}


def test_accuracy_is_of_the_bounds(tasks, language_run, tmp_path):
    """The command's accuracy is what comparing the adapter's own numbers gives."""
    from fastdiff.tasks.masked_lm.run import load_language_model

    loaded = load_language_model(language_run, device="cpu")
    harness = FastdiffLM(loaded.model, loaded.tokenizer, num_draws=8)
    right = 0
    for row in ROWS:
        values = harness.loglikelihood(requests(*((row["question"], c) for c in row["choices"])), disable_tqdm=True)
        right += max((value, i) for i, (value, _) in enumerate(values))[1] == row["label"]
    output = tmp_path / "scores.json"
    options = ["--no-held-out", "--lm-eval", "local_multiple_choice", "--lm-eval-include-path", str(tasks)]
    evaluate.main([str(language_run), *options, "--draws", "8", "--output", str(output)])
    results = json.loads(output.read_text())["lm_eval"]["results"]["local_multiple_choice"]
    assert results["acc,none"] == pytest.approx(right / len(ROWS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--lm-eval", "no_such_task"],
            "--lm-eval: got 'no_such_task', which lm-eval does not know.*--lm-eval-include",
        ),
        (["--lm-eval", ","], "--lm-eval: got no task"),
        (["--lm-eval", "x", "--lm-eval-include-path", "/nowhere"], "got '/nowhere', which is not a folder"),
        (["--no-held-out"], "nothing to evaluate: --no-held-out; pass --lm-eval TASKS"),
        (["--draws", "0", "--lm-eval", "x"], "--draws: got 0; expected at least 1"),
        (["--num-samples", "3"], "nrecognized arguments: --num-samples"),
        (["--sampler", "ddim"], "nrecognized arguments: --sampler"),
        (["--block-length", "0"], "block_length: got 0; expected an int of 1"),
    ],
)
def test_bad_options(language_run, capsys, options, message, monkeypatch):
    # without the thousands of tasks that lm-eval brings, whose reading takes 6 s
    quick = functools.partial(TaskManager, include_defaults=False)
    monkeypatch.setattr("fastdiff.integrations.lm_eval.TaskManager", lambda include_path, **_: quick())
    with pytest.raises(SystemExit) as exit_:
        evaluate.main([str(language_run), *options])
    text = capsys.readouterr().err.strip()
    assert exit_.value.code == 2 and text.startswith("error: ") and "\n" not in text
    assert re.search(message, text), text


def test_a_missing_package_is_named(language_run, capsys, monkeypatch):
    for name in [name for name in sys.modules if name == "lm_eval" or name.startswith("lm_eval.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "fastdiff.integrations.lm_eval")
    monkeypatch.delattr("fastdiff.integrations.lm_eval")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit) as exit_:
        evaluate.main([str(language_run), "--lm-eval", "hellaswag"])
    text = capsys.readouterr().err.strip()
    assert exit_.value.code == 2 and text.endswith("pip install 'fastdiff-kernels[lm-eval]'") and "\n" not in text


def test_the_bound_of_the_whole_text_agrees_with_likelihood_bound(model):
    """Two ways to the same number: the harness's and `likelihood_bound`, both within their noise of the enumeration."""
    ids = torch.tensor(byte_tokenizer()("to be")["input_ids"])
    (value,) = adapter(model, num_draws=3000, batch_size=500).loglikelihood_rolling(
        requests(("to be",)), disable_tqdm=True
    )
    with_end = torch.cat([torch.tensor([2]), ids])
    maskable = torch.arange(len(with_end)) > 0
    assert -value / len(ids) == pytest.approx(exact(model, [with_end], [maskable]), rel=0.06)


@pytest.mark.parametrize("adds", [False, True])
def test_what_a_tokenizer_puts_behind_a_text_scores_no_choice(adds):
    """A template [CLS] … [SEP]: choices are scored, not one same token; contexts are what training had."""
    tokenizer = bert_like()
    fields = dict(mask_token_id=4, pad_token_id=0, bos_token_id=2, eos_token_id=3, add_special_tokens=adds)
    harness = FastdiffLM(tiny_model(13, **fields).double(), tokenizer, num_draws=2)
    red, cat, runs = tokenizer.convert_tokens_to_ids(["red", "cat", "runs"])
    assert harness._encode_pair("red cat", " runs") == ([2] * adds + [red, cat], [runs])
    assert harness.prefix_token_id == (2 if adds else 3)
    first, second = harness.loglikelihood(requests(("red cat", " runs"), ("red cat", " to")), disable_tqdm=True)
    assert first[0] != second[0]
    assert harness.codec.encode_prompt("red cat") == harness.tok_encode("red cat")


def test_a_context_word_that_is_the_mask_token_is_not_filled():
    model = tiny_model(280, mask_token_id=50).double()
    lm = FastdiffLM(model, byte_tokenizer(mask_token=None), num_draws=2)
    context, config = [20, 50, 30], MaskedDiffusionGenerationConfig(max_new_tokens=2)
    given = lm.codec.as_given(context)
    decoded = generate(model, torch.tensor([given]), None, config).sequences[0, 3:].tolist()
    ((_, greedy),) = lm._loglikelihood_tokens([(None, context, decoded)], True)
    assert greedy
    word = byte_tokenizer().decode([50])
    answers = lm.generate_until(requests((word * 2, {"max_gen_toks": 2})), disable_tqdm=True)
    assert len(answers) == 1
