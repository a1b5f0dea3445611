"""Python calls with values of other types: one line that names the argument, before any work."""

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff.generation import MaskedDiffusionGenerationConfig, generate


def test_python_calls_of_other_types_are_one_line(language_run):
    run = fastdiff.load(language_run, device="cpu")
    model, ids = run.model, torch.tensor([[9, 8]])
    config = MaskedDiffusionGenerationConfig(max_new_tokens=4)
    calls = {
        "prompts: got None; expected a text": lambda: run.generate(None),
        "prompts: got .3.; expected a text": lambda: run.generate([3]),
        "num_samples: got 'x'; expected at least 1": lambda: run.generate("a", num_samples="x"),
        "seed: got 'x'; expected an int or None": lambda: run.generate("a", seed="x"),
        "seed: got 18446744073709551616; expected an int below 2.63 or None": lambda: run.generate("a", seed=2**64),
        "temperature: got '1'": lambda: run.generate("a", temperature="1"),
        "eos_token_id: got 'x'": lambda: MaskedDiffusionGenerationConfig(eos_token_id="x"),
        "model: got a NoneType; expected a fastdiff.models.MaskedDiffusionLM": lambda: generate(None, ids),
        "model: got a Linear": lambda: generate(torch.nn.Linear(1, 1), ids),
        "input_ids: got NoneType": lambda: generate(model, None),
        "input_ids: got str": lambda: generate(model, "to be"),
        "attention_mask: got a str": lambda: generate(model, ids, "x", config),
        "generation_config: got a dict": lambda: generate(model, ids, None, {"max_new_tokens": 4}),
        "streamer: got a int": lambda: generate(model, ids, None, config, 5),
        "length_predictor: got a int": lambda: generate(model, ids, None, config, length_predictor=5),
        "tokenizer: got a int": lambda: generate(model, ids, None, config, tokenizer=5),
        "copies: got 5; expected 1 numbers": lambda: generate(model, ids, None, config, copies=5),
        "copies: got .1.5.; expected": lambda: generate(model, ids, None, config, copies=[1.5]),
    }
    for message, call in calls.items():
        with pytest.raises((TypeError, ValueError), match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_numpys_numbers_and_arrays_are_numbers_and_lists():
    given = {"max_new_tokens": 4, "seed": 3, "temperature": 0.5, "suppress_tokens": [5, 6], "early_stop": False}
    config = MaskedDiffusionGenerationConfig(
        max_new_tokens=np.int64(4), seed=np.uint32(3), temperature=np.float32(0.5), suppress_tokens=np.array([5, 6]),
        early_stop=np.bool_(False), begin_suppress_tokens=range(2), unmasking_order="confidence",
    )  # fmt: skip
    for name, value in given.items():
        assert getattr(config, name) == value and type(getattr(config, name)) is type(value)
    assert config.begin_suppress_tokens == [0, 1]
    config.to_json_string()
