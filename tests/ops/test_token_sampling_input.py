"""What sample_tokens and lm_head_sample say of arguments that do not fit: one line, naming them."""

import math

import numpy as np
import pytest
import torch

from fastdiff.ops import lm_head_sample, sample_tokens

Z, H, W = torch.zeros(2, 3, 10), torch.zeros(2, 3, 4), torch.zeros(10, 4)
BAD = [
    ({"temperature": -0.1}, "temperature: got -0.1; expected a finite number of 0 or above"),
    ({"temperature": math.nan}, "temperature: got nan; expected a finite number of 0 or above"),
    (
        {"temperature": torch.tensor([1.0, -1.0])},
        r"temperature: got shape \[2\]; expected a finite number .* of shape \[2, 3\]",
    ),
    (
        {"temperature": torch.full((2, 3), -1.0)},
        "temperature: got a value of -1.0; expected a finite number of 0 or above",
    ),
    ({"top_p": 0.0}, r"top_p: got 0.0; expected a number in \(0, 1\]"),
    ({"top_p": 1.1}, r"top_p: got 1.1; expected a number in \(0, 1\]"),
    ({"top_k": -1}, "top_k: got -1; expected an int of 1 or more"),
    ({"suppress_tokens": [10]}, "suppress_tokens: got 10; expected ids from 0 to 9"),
    ({"suppress_tokens": torch.tensor([-1])}, "suppress_tokens: got -1; expected ids from 0 to 9"),
    ({"suppress_tokens": range(10)}, "suppress_tokens: got all 10 ids of the vocabulary; leave at least one"),
    ({"end_token_ids": [3, 99]}, "end_token_ids: got 99; expected ids from 0 to 9"),
    ({"seed": 2**63}, "seed: got 9223372036854775808; expected an int of 64 bits"),
    ({"seed": 1.5}, "seed: got 1.5; expected an int"),
    ({"step": 2**32}, r"step: got 4294967296; expected an int from 0 to 2\*\*32 - 1"),
    ({"temperature": "a"}, "temperature: got 'a'; expected a finite number"),
    ({"temperature": math.inf}, "temperature: got inf; expected a finite number"),
    ({"top_p": "x"}, "top_p: got 'x'; expected a number"),
    ({"top_k": True}, "top_k: got True; expected an int"),
    ({"suppress_tokens": 3}, "suppress_tokens: got 3; expected a list of ints or an int64 tensor"),
    ({"seed": torch.zeros(2, dtype=torch.int64)}, r"seed: got shape \[2\]; expected one number"),
    ({"step": torch.zeros(())}, "step: got torch.float32; expected int64"),
    ({"sequence_ids": torch.arange(3)}, r"sequence_ids: got shape \[3\]; expected \[2\] or \[2, 3\]"),
    ({"positions": torch.arange(2)}, r"positions: got shape \[2\]; expected \[3\] or \[2, 3\]"),
    ({"positions": torch.zeros(3)}, "positions: got torch.float32; expected int64"),
    ({"invalid": "ignore"}, "invalid: got 'ignore'; expected 'raise' or 'flag'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda v: str(v)[:40] if isinstance(v, dict) else "")
@pytest.mark.parametrize("operator", ["sample_tokens", "lm_head_sample"])
def test_bad_arguments(operator, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message) as error:
        sample_tokens(Z, **arguments) if operator == "sample_tokens" else lm_head_sample(H, W, **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sample_tokens(np.zeros((2, 3))), "logits: got a ndarray; expected a torch.Tensor"),
        (lambda: sample_tokens(torch.zeros(2, 3, dtype=torch.int64)), "logits: got torch.int64; expected float32"),
        (lambda: sample_tokens(torch.zeros(())), r"logits: got shape \[\]"),
        (lambda: sample_tokens(torch.zeros(2, 0)), r"logits: got shape \[2, 0\]; expected at least one id"),
        (lambda: lm_head_sample(H, torch.zeros(10, 5)), r"weight: got shape \[10, 5\]; expected \[V, 4\]"),
        (lambda: lm_head_sample(H, torch.zeros(0, 4)), r"weight: got shape \[0, 4\]; expected \[V, 4\] with V > 0"),
        (lambda: lm_head_sample(H, W, torch.zeros(9)), r"bias: got shape \[9\]; expected \[10\]"),
        (lambda: lm_head_sample(H, W.bfloat16()), "weight: got torch.bfloat16, with torch.float32 of hidden"),
    ],
)
def test_bad_tensors(call, message):
    with pytest.raises((ValueError, TypeError), match=message) as error:
        call()
    assert "\n" not in str(error.value)
