"""Runs of tiny language models, written as the trainer writes them."""

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fastdiff import train
from fastdiff.data.text_config import TextDataConfig
from fastdiff.models import MaskedDiffusionLM, MaskedDiffusionLMConfig
from fastdiff.tasks.masked_lm.recipe import MaskedLMRecipe, TextSamplingConfig
from fastdiff.training.checkpoint import write_checkpoint
from fastdiff.training.config import TrainingConfig

SPECIAL = ("pad", "bos", "eos", "mask", "unk")
TEXT = ["To be, or not to be, that is the question: é, ü, 你好, 🙂."] * 3


def byte_tokenizer(**special: str | None) -> PreTrainedTokenizerFast:
    """Byte-level BPE with `<pad>` … `<unk>` as ids 0 … 4; bos_token=None, say, leaves one unnamed."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = [f"<{name}>" for name in SPECIAL]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=280, special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    )
    tokens = {f"{name}_token": f"<{name}>" for name in SPECIAL} | special
    tokens = {name: token for name, token in tokens.items() if token is not None}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)


def tiny_model(vocab_size: int, seed: int = 0, **options) -> MaskedDiffusionLM:
    fields = dict(
        vocab_size=vocab_size, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=48,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = MaskedDiffusionLM(MaskedDiffusionLMConfig(**{**fields, **options})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def write_run(
    folder: Path, data: TextDataConfig | None = None, generation: dict | None = None, steps=(2, 3), **options
) -> Path:
    """A run's folder with checkpoints; the averaged weights differ from the plain ones."""
    tokenizer = byte_tokenizer()
    recipe = MaskedLMRecipe(
        data=data or TextDataConfig(),
        training=TrainingConfig(output_dir=str(folder)),
        sampling=TextSamplingConfig(generation=generation or {"max_new_tokens": 12, "block_length": 6}),
    )
    folder.mkdir(parents=True, exist_ok=True)
    values = dataclasses.asdict(recipe)
    values["training"]["betas"] = list(values["training"]["betas"])
    (folder / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    for step in steps:
        model, average = (tiny_model(len(tokenizer), seed, **options) for seed in (step, step + 100))
        state = {name: t.contiguous() for name, t in average.state_dict().items() if name != "lm_head.weight"}

        def write(path: Path, model=model, state=state) -> None:
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)
            save_file(state, path / "ema.safetensors")

        write_checkpoint(folder / "checkpoints", step, {"task": {}}, write, keep_last=2)
    return folder


def make_runs(tmp_path_factory: pytest.TempPathFactory, recipe: dict):
    """Of a fixture: yields make(**data) → the folder of a run trained by `recipe`, with a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTDIFF_CACHE", str(tmp_path_factory.mktemp("cache")))

        def make(**data) -> Path:
            folder = tmp_path_factory.mktemp("runs")
            content = recipe | {"data": {**recipe["data"], **data}}
            (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
            train.main([str(folder / "recipe.yaml"), "--training.output_dir", str(folder / "run")])
            return folder / "run"

        yield make
