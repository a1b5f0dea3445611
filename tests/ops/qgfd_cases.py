"""Cases of qgfd_attention for the harness."""

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.kernels.qgfd import reference
from ops.harness import BF16, F16, F32, Case, Dtypes, Inputs, Operator


def _randn(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int, layout: str) -> Tensor:
    """[B, H, L, d]: "turned" from [B, L, H, d], "sliced" out of a wider tensor, "unaligned" one element off."""
    batch, heads, length, dim = shape
    generator = torch.Generator().manual_seed(seed)
    if layout == "turned":
        return torch.randn(batch, length, heads, dim, generator=generator).to(device, dtype).transpose(1, 2)
    if layout == "sliced":
        wide = torch.randn(batch, heads + 1, length + 2, 3 * dim, generator=generator).to(device, dtype)
        return wide[:, 1:, 1:-1, dim : 2 * dim]
    flat = torch.randn(batch * heads * length * dim + 1, generator=generator).to(device, dtype)
    return flat[1:].view(shape) if layout == "unaligned" else flat[1:].clone().view(shape)


def _key_mask(kind: str, batch: int, keys: int) -> Tensor:
    """ "some": two keys in three, the first sample's first not among them; "a-sample-without": none in the second."""
    mask = torch.rand(batch, keys, generator=torch.Generator().manual_seed(keys)) < 0.67
    mask[0, 0] = False
    if kind == "a-sample-without":
        mask[1] = False
    return mask


def qgfd_inputs(
    shape,  # (B, H, L_q, d)
    kv_heads=None,
    keys=None,
    layout="plain",
    key_mask=None,
    cu_seqlens=None,
    prefix_length=None,  # a number, or a list that becomes a tensor
    **options,
):
    """A function from (dtypes, device) to the arguments of qgfd_attention."""
    batch, heads, queries, dim = shape
    kv_heads, keys = heads if kv_heads is None else kv_heads, queries if keys is None else keys

    def make(dtypes: Dtypes, device: str) -> Inputs:
        inputs: Inputs = {"query": _randn(shape, dtypes.stream, device, 1, layout)}
        for seed, name in enumerate(("key", "value"), 2):
            inputs[name] = _randn((batch, kv_heads, keys, dim), dtypes.other, device, seed, layout)
        if key_mask is not None:
            inputs["key_mask"] = _key_mask(key_mask, batch, keys).to(device)
        if cu_seqlens is not None:
            inputs["cu_seqlens"] = torch.tensor(cu_seqlens, device=device)
        if prefix_length is not None:
            tensor = isinstance(prefix_length, list)
            inputs["prefix_length"] = torch.tensor(prefix_length, device=device) if tensor else prefix_length
        return inputs | options | ({"enable_gqa": True} if kv_heads != heads else {})

    return make


def _cases() -> list[Case]:
    cases = []

    def add(name, shape, **settings):
        # With one key the softmax is 1, whatever the scores: query's and key's gradients are 0.
        cases.append(Case(name, qgfd_inputs(shape, **settings), cancels=shape[2] == 1))

    restart = {"recurrence": "restart"}
    by_key = {"transition": "key"}
    add("odd", (2, 3, 9, 24))
    add("prime", (1, 2, 37, 24), steps=2, alpha=0.7)
    add("one-row", (2, 2, 1, 16), steps=2)
    add("no-batch", (0, 2, 5, 16))
    add("no-heads", (2, 0, 5, 16))
    add("no-rows", (2, 2, 0, 16), keys=5, **by_key)
    add("no-keys", (2, 2, 3, 16), keys=0, **by_key)
    for layout in ("unaligned", "turned", "sliced"):
        add(layout, (2, 3, 10, 24), layout=layout, steps=2)
    for dim in (8, 40, 64, 96, 128, 256):
        add(f"dim{dim}", (1, 2, 21, dim))
    add("steps2", (2, 2, 19, 16), steps=2, alpha=0.3)
    add("steps5", (2, 2, 19, 16), steps=5, alpha=0.9)
    add("alpha1", (2, 2, 19, 16), steps=2, alpha=1.0)
    add("alpha0.02", (2, 2, 19, 16), alpha=0.02)
    add("restart", (2, 2, 19, 16), steps=4, alpha=0.6, **restart)
    add("temperature", (2, 2, 19, 16), temperature=4.0, scale=0.4)
    add("temperature-restart", (2, 2, 19, 16), steps=3, temperature=0.7, key_mask="some", **restart)
    add("key-mask", (3, 2, 23, 16), key_mask="some", steps=2)
    add("a-sample-without-keys", (3, 2, 7, 16), key_mask="a-sample-without", steps=2)
    add("causal", (2, 2, 23, 16), is_causal=True, steps=2)
    add("causal-key-mask", (2, 2, 23, 16), is_causal=True, key_mask="some", **restart)
    add("prefix", (2, 2, 23, 16), prefix_length=7, steps=2)
    add("prefix-a-sample", (3, 2, 23, 16), prefix_length=[0, 5, 40], key_mask="some")
    add("varlen", (1, 2, 40, 16), cu_seqlens=(0, 13, 14, 14, 40), steps=2)
    add("varlen-causal", (1, 2, 40, 16), cu_seqlens=(0, 13, 14, 40), is_causal=True, key_mask="some")
    add("varlen-prefix", (1, 2, 40, 16), cu_seqlens=(0, 13, 14, 40), prefix_length=[4, 3, 0], steps=2)
    add("grouped", (2, 6, 11, 16), kv_heads=2, steps=2)
    add("grouped-temperature", (2, 4, 11, 16), kv_heads=1, temperature=2.0, is_causal=True, layout="turned")
    add("key", (2, 2, 19, 16), steps=2, temperature=0.25, **by_key)
    add("key-restart", (2, 2, 19, 16), steps=3, is_causal=True, **by_key, **restart)
    add("key-cross", (2, 4, 5, 16), kv_heads=2, keys=30, key_mask="some", **by_key)
    add("key-causal-cross", (2, 2, 30, 16), keys=21, is_causal=True, **by_key)  # 9 queries see no key
    add("key-sink", (2, 2, 19, 16), key_mask="some", sink_isolation=True, steps=2, **by_key)
    add("key-sink-varlen", (1, 2, 31, 16), cu_seqlens=(0, 13, 14, 31), sink_isolation=True, is_causal=True, **by_key)
    add("two-tiles", (1, 2, 130, 32), is_causal=True, steps=2)
    add("many-tiles", (1, 1, 300, 64), steps=2, **restart)
    add("many-tiles-key", (1, 1, 300, 64), keys=270, key_mask="some", **by_key)
    add("many-rows", (2, 2, 150, 16), key_mask="some", is_causal=True, steps=2)
    add("eight-heads", (1, 8, 300, 16), key_mask="some", steps=2)
    add("batch", (3, 4, 300, 24), key_mask="some", prefix_length=[0, 5, 40], steps=2)
    return cases


def _run(**kw) -> tuple[Tensor]:
    return (ops.qgfd_attention(**kw),)


def _reference(**kw) -> tuple[Tensor]:
    kw.pop("enable_gqa", None)
    return (reference.qgfd_attention(kw.pop("query"), kw.pop("key"), kw.pop("value"), **kw),)


def _shorten(inputs: Inputs, length: int) -> Inputs:
    short = {"key_mask": inputs["key_mask"][:, :length].contiguous()}
    return inputs | short | {name: inputs[name][:, :, :length].contiguous() for name in ("query", "key", "value")}


def _second(inputs: Inputs) -> Inputs:
    return {k: v[1:2] if isinstance(v, Tensor) else v for k, v in inputs.items()}


QGFD = Operator(
    "qgfd_attention",
    _run,
    _reference,
    _cases(),
    dtypes=[Dtypes(F32, F32), Dtypes(BF16, BF16), Dtypes(F16, F16), Dtypes(F32, BF16, BF16)],
    many="many-rows",
    lengths=(140, 100, 64),
    shorten=_shorten,
    batch="batch",
    second=_second,
)
