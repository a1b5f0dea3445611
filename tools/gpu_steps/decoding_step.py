"""One decoding step of a model of LLaDA-8B's shape with random weights: the whole forward pass, a draw, a commit.

fastdiff draws for the block's positions alone, from hidden states; the public loop makes the logits of all positions
and takes a softmax of them in fp64.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.nn.rotary import rotary_table, rotate
from fastdiff.nn.transformer import TransformerBlock
from gpu_steps.bench import Bench
from gpu_steps.device import Function

EPS, THETA, BLOCK = 1e-5, 5e5, 32
OPERATORS = ("adaln", "lm_head_sample", "unmask_")
REAL = {"dim": 4096, "heads": 32, "hidden": 12_288, "layers": 32, "vocab": 126_464, "length": 256}
SMALL = {"dim": 64, "heads": 4, "hidden": 96, "layers": 2, "vocab": 700, "length": 40}


class Model(nn.Module):
    """Embedding, blocks, norm and head."""

    def __init__(self, dim: int, heads: int, hidden: int, layers: int, vocab: int, length: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                dim, heads, hidden, attention={"bias": False, "output_bias": False},
                feed_forward={"activation": "silu", "gated": True, "bias": False}, norm={"norm": "rms", "eps": EPS},
            )
            for _ in range(layers)
        )  # fmt: skip
        self.norm = nn.Parameter(torch.ones(dim))
        self.head = nn.Linear(dim, vocab, bias=False)
        self.heads, self.mask = heads, vocab - 1

    def states(self, ids: Tensor, block: Callable) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        table = rotary_table(positions, self.norm.numel() // self.heads, THETA)
        x = self.embed(ids)
        for layer in self.blocks:
            x = block(layer, x, table)
        return x


def fused_block(layer: TransformerBlock, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    return layer(x, None, table)


def public_block(layer: TransformerBlock, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """The same block with torch's own functions."""
    attention, mlp = layer.self_attn, layer.mlp
    normed = F.rms_norm(x, x.shape[-1:], layer.input_layernorm.weight, EPS)
    q, k, v = (
        projection(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    mixed = F.scaled_dot_product_attention(rotate(q, table), rotate(k, table), v)
    x = x + attention.o_proj(mixed.transpose(1, 2).flatten(2))
    normed = F.rms_norm(x, x.shape[-1:], layer.post_attention_layernorm.weight, EPS)
    return x + mlp.down_proj(F.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))


def fused_step(model: Model, start: Tensor, block: Callable) -> Function:
    batch, length = start.shape
    rows = torch.arange(batch * length, device=start.device).view(batch, length)[:, -BLOCK:].flatten()
    ids = start.clone()

    def step() -> Tensor:
        ids.copy_(start)
        states = model.states(ids, block).flatten(0, 1)[rows]
        states = ops.adaln(states, None, None, weight=model.norm, norm="rms", eps=EPS)
        sample = ops.lm_head_sample(states, model.head.weight, suppress_tokens=(model.mask,), seed=7, invalid="flag")
        return ops.unmask_(ids, sample, model.mask, count=1, rows=rows, seed=7)

    return step


def public_step(model: Model, start: Tensor, block: Callable) -> Function:
    ids = start.clone()

    def step() -> Tensor:
        ids.copy_(start)
        masked = ids == model.mask
        states = model.states(ids, block)
        logits = model.head(F.rms_norm(states, states.shape[-1:], model.norm, EPS))
        logits[..., model.mask] = -torch.inf
        token = logits.argmax(dim=-1)
        p = F.softmax(logits.to(torch.float64), dim=-1)
        confidence = torch.where(masked, p.gather(-1, token[..., None])[..., 0], -torch.inf)
        transfer = torch.zeros_like(masked)
        for row in range(len(ids)):
            transfer[row, confidence[row].topk(1).indices] = True
        ids[transfer] = token[transfer]
        return ids

    return step


@torch.no_grad()
def run(bench: Bench) -> None:
    shape = SMALL if bench.small else REAL
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with bench.device:
            model = Model(**shape).eval()
    finally:
        torch.set_default_dtype(before)
    for batch in (1, 8):
        start = bench.ids(shape["vocab"] - 1, batch, shape["length"])
        start[:, -BLOCK:] = model.mask
        case = f"{shape['layers']} blocks of width {shape['dim']}, B{batch} L{shape['length']}"
        fused, public = fused_step(model, start, fused_block), public_step(model, start, public_block)
        wall(bench, case, "fastdiff", lambda fused=fused: fused)
        wall(bench, case, "public", lambda public=public: public)
        wall(bench, case, "fastdiff, in a CUDA graph", lambda fused=fused: in_graph(bench, fused))
        for name, make, block in (("public", public_step, public_block), ("fastdiff", fused_step, fused_block)):

            def compiled(make=make, block=block, start=start) -> Function:
                return make(model, start, torch.compile(block, **bench.on.compile_options))

            wall(bench, case, f"{name}, blocks compiled", compiled)
    bench.record.note(f"{bench.on.memory():.1f} GiB of the device's memory were held at most")


def in_graph(bench: Bench, step: Function) -> Function:
    step()
    return bench.on.graph([step], 1)


def wall(bench: Bench, case: str, contender: str, make: Callable[[], Function]) -> None:
    """Time of a step as the host sees it: it waits for one before it queues the next, as decoding does."""

    def seconds() -> float:
        step = make()
        step()

        def waited() -> None:
            step()
            bench.on.synchronize()

        return bench.on.wall(waited, 10)[1]

    backend = "cuda" if contender.startswith("fastdiff") else None
    bench.by_the_clock(OPERATORS, case, contender, seconds, backend=backend)
