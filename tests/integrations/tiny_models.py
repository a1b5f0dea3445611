"""Random transformers models of two layers, built from configs, and attention as QGFD is defined."""

import torch
import transformers
from torch import nn

TOLERANCE = 1e-5  # of 1 + the largest output (gradients: ratio of norms); observed: 2.9e-6, fp32 on an AVX-512 machine
LENGTH, VOCAB = 9, 50
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
GPT2 = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 64}
TOKENS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = SIZES | TOKENS | {"num_key_value_heads": 2}
NAMES = ["bert", "vit", "gpt2", "llama"]
CAUSAL = ["gpt2", "llama"]
SETTINGS = [
    {"steps": 1},
    {"steps": 2, "alpha": 0.8, "recurrence": "restart", "temperature": 2.0},
    {"steps": 2, "transition": "key", "temperature": 0.5},
    {"steps": 1, "transition": "key", "sink_isolation": True},
]


def build(name, settings=None, implementation="qgfd", **changes):
    config, kind = {
        "bert": (transformers.BertConfig, transformers.BertModel),
        "vit": (transformers.ViTConfig, transformers.ViTModel),
        "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "bart": (transformers.BartConfig, transformers.BartForConditionalGeneration),
        "t5": (transformers.T5Config, transformers.T5Model),
        "qformer": (transformers.Blip2QFormerConfig, transformers.Blip2QFormerModel),
    }[name]
    given = {
        "bert": SIZES | {"vocab_size": VOCAB},
        "vit": SIZES | {"image_size": 12, "patch_size": 4},
        "gpt2": GPT2 | TOKENS,
        "llama": LLAMA,
        "mistral": LLAMA | {"sliding_window": 4},
        "bart": TOKENS
        | {"d_model": 32, "max_position_embeddings": 64}
        | {
            f"{side}_{what}": n
            for side in ("encoder", "decoder")
            for what, n in (("layers", 2), ("attention_heads", 4))
        }
        | {f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")},
        "t5": {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
        "qformer": SIZES | {"encoder_hidden_size": 20, "cross_attention_frequency": 1},
    }[name]
    torch.manual_seed(0)
    model = kind(config(**(given | changes))).eval()
    for parameter in model.parameters():  # sharp attention, so that hops change something
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    model.set_attn_implementation(implementation)
    if settings is not None:
        model.config.qgfd = settings
    return model


def inputs(name, batch=3):
    torch.manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(batch, 3, 12, 12)}
    return {"input_ids": torch.randint(3, VOCAB, (batch, LENGTH))}


def padding(side):
    mask = torch.ones(3, LENGTH, dtype=torch.int64)
    mask[1, :4] = 0
    mask[2, :1] = 0
    return mask if side == "left" else mask.flip(1)


def first(model, **given):
    return model(**given)[0]


def close(got, wanted):
    scale = 1 + wanted.abs().max()
    assert (got - wanted).abs().max() <= TOLERANCE * scale, f"off by {(got - wanted).abs().max() / scale:.2e}"


def definition(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **others):
    """Attention as QGFD is defined, with L x L matrices; attention_mask is bool [B, 1, L, L]."""
    settings = {"steps": 1, "alpha": 0.5, "transition": "attention", "recurrence": "power", "temperature": 1.0}
    settings |= module.config.qgfd
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    mask = torch.ones(key.shape[2], key.shape[2], dtype=torch.bool) if attention_mask is None else attention_mask

    def weights(scores):
        return scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0)

    a, p = weights(query @ key.mT * scaling), weights(query @ key.mT * scaling / settings["temperature"])
    if settings["transition"] == "key":
        unit = key / key.norm(dim=-1, keepdim=True)
        p = weights(unit @ unit.mT / settings["temperature"])
        if settings.get("sink_isolation"):
            rows = mask.expand(len(query), -1, -1, -1).any(-2)[:, 0].int().argmax(-1)
            for sample, row in enumerate(rows.tolist()):
                p[sample, :, row] = torch.eye(p.shape[-1])[row]
    mixed = a
    for step in range(1, settings["steps"] + 1):
        mixed = mixed @ p
        if settings["recurrence"] == "restart" or step == settings["steps"]:
            mixed = settings["alpha"] * mixed + (1 - settings["alpha"]) * a
    return (mixed @ value).transpose(1, 2), None
