"""Special tokens of foreign checkpoints: those of the loaded tokenizer and of the configurations, where they can be."""

import json

import pytest
from models.test_masked_lm_checkpoints import gpt2, llama
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from fastdiff.models import MaskedDiffusionLM


def with_tokenizer(folder, theirs, tokenizer, named=None, **config):
    """A folder of a model and a tokenizer whose special tokens are named in special_tokens_map.json alone, or not."""
    theirs.save_pretrained(folder)
    edit(folder / "config.json", **config)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    if named is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(named))
    return folder


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def words(*tokens):
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(50)} | {t: 50 + i for i, t in enumerate(tokens)}))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_a_mask_token_of_special_tokens_map_alone(tmp_path):
    folder = with_tokenizer(tmp_path, llama(), words("<m>", "<e>"), {"mask_token": "<m>"}, pad_token_id=-1)
    config = MaskedDiffusionLM.from_pretrained(folder).config
    assert config.mask_token_id == 50 and config.pad_token_id is None and config.add_special_tokens


def test_a_mask_token_of_the_vocabulary_alone(tmp_path):
    """tokenizer_config.json names it; no file says its id but the vocabulary."""
    folder = with_tokenizer(tmp_path, llama(), words("<m>"))
    edit(folder / "tokenizer_config.json", mask_token="<m>", pad_token={"content": "w7", "__type": "AddedToken"})
    config = MaskedDiffusionLM.from_pretrained(folder).config
    assert (config.mask_token_id, config.pad_token_id) == (50, 7)


def test_a_tokenizer_that_cannot_be_loaded_is_named(tmp_path):
    folder = with_tokenizer(tmp_path, llama(), words("<m>"))
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="pass mask_token_id=.*no tokenizer that can be loaded"):
        MaskedDiffusionLM.from_pretrained(folder)
    assert MaskedDiffusionLM.from_pretrained(folder, mask_token_id=3).config.mask_token_id == 3


def test_end_tokens_beyond_the_vocabulary_are_none(tmp_path):
    """GPT2Config's defaults, 50256, were made for another vocabulary."""
    theirs = gpt2(bos_token_id=50256, eos_token_id=50256)
    config = MaskedDiffusionLM.from_gpt2(theirs, mask_token_id=9).config
    assert config.bos_token_id is None and config.eos_token_id is None
    named = {"eos_token": "<e>", "mask_token": "<m>"}
    config = MaskedDiffusionLM.from_pretrained(with_tokenizer(tmp_path, theirs, words("<m>", "<e>"), named)).config
    assert (config.mask_token_id, config.eos_token_id, config.bos_token_id) == (50, 51, None)


@pytest.mark.parametrize(
    ("ends", "expected"), [([5, 2, 6], [2, 5, 6]), ([5, 6, 900], [5, 6]), (5, 5), (None, 2), ([], 2)]
)
def test_end_tokens_of_the_generation_config(tmp_path, ends, expected):
    llama().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    assert MaskedDiffusionLM.from_pretrained(tmp_path, mask_token_id=3).config.eos_token_id == expected


def test_a_folder_without_tokenizer_has_no_tokens_of_one(tmp_path):
    theirs = gpt2(bos_token_id=None, eos_token_id=None)
    theirs.save_pretrained(tmp_path)
    config = MaskedDiffusionLM.from_pretrained(tmp_path, mask_token_id=3).config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, 60)
