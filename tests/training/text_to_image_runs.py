"""Tiny recipes of text to image, on scikit-learn's digits, whose texts are the names of their classes."""

import copy

import pytest
import torch
import yaml

DIT = {
    "model": {
        "input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 32, "depth": 2, "num_heads": 2,
        "num_classes": 10, "class_dropout_prob": 0.2,
    },
    "diffusion": {"prediction_type": "flow", "noise_levels": "logit_normal"},
    "data": {"name": "digits"},
    "training": {
        "batch_size": 8, "max_steps": 4, "checkpoint_every": 2, "keep_last": 9, "log_every": 2, "warmup_steps": 2,
        "mixed_precision": "no", "device": "cpu",
    },
    "sampling": {"num_inference_steps": 2, "images_per_class": 1},
}  # fmt: skip
SAMPLING = {"num_inference_steps": 2, "images_per_prompt": 1, "prompts": ["3", "7"], "guidance_scale": 2.0}
# a Q-Former for a DiT that is trained already, and stays as it is
Q_FORMER = {
    "task": "text_to_image",
    "train": "q_former",
    "q_former": {"hidden_size": 16, "num_queries": 2, "depth": 1, "num_heads": 2},
    "text_encoder": {"name": "one_hot"},
    "objective": {"text_dropout_prob": 0.1},
    **{name: DIT[name] for name in ("diffusion", "data", "training")},
    "sampling": SAMPLING,
}
# cross-attention from random weights, as latent Fashion-MNIST diffusion trains
CROSS = {
    "task": "text_to_image",
    "model": {
        "input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 32, "depth": 2, "num_heads": 2,
        "num_classes": 0, "null_label": False, "class_dropout_prob": 0.0, "conditioning": "cross_attention",
        "mlp_conv": True, "position_embedding": "learned", "time_embedding": "fourier",
    },
    "text_encoder": {"name": "one_hot"},
    "diffusion": {
        "prediction_type": "sample", "noise_levels": "beta", "time_range": [0.01, 0.99], "time_scale": 100.0
    },
    "data": {"name": "digits"},
    "training": DIT["training"],
    "sampling": {**SAMPLING, "sampler": "renoise"},
}  # fmt: skip


def write_recipe(path, recipe, **changes):
    """Writes a recipe as YAML, with fields replaced: section={field: value}, or name=value. Returns the path."""
    recipe = copy.deepcopy(recipe)
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(recipe.get(name), dict):
            recipe[name] |= value
        else:
            recipe[name] = value
    path.write_text(yaml.safe_dump(recipe))
    return path


def write_reader(folder, words):
    """A tiny BERT of random weights that knows these words, in a folder; returns it."""
    import transformers
    from tokenizers_of_kinds import bert_like

    tokenizer = bert_like(words)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16}
    torch.manual_seed(0)
    config = transformers.BertConfig(**sizes, vocab_size=1 + max(tokenizer.get_vocab().values()))
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def refused(command, arguments, capsys) -> str:
    """The one line with which a command refuses its arguments."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        command.main([str(each) for each in arguments])
    text = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.value.code == 2 and text.startswith("error: "), text
    return text
