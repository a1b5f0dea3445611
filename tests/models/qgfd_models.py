"""Tiny QGFD models of every modality, their batches, and random Hugging Face checkpoints."""

import torch
from transformers import (
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
)

from fastdiff.models import QGFDConfig, QGFDModel, QGFDModelConfig
from fastdiff.models.qgfd.adapters import (
    AudioAdapterConfig,
    ImageAdapterConfig,
    TabularAdapterConfig,
    TextAdapterConfig,
    VideoAdapterConfig,
)

MODALITIES = ("text", "image", "audio", "video", "tabular")
PRETRAINED = ("text", "image", "audio", "video")  # modalities that have Hugging Face encoders
SMALL = dict(hidden_size=16, num_heads=2)
ADAPTERS = {
    "text": (TextAdapterConfig, dict(vocab_size=20, max_length=6, pad_token_id=1, conditional=True)),
    "image": (ImageAdapterConfig, dict(image_size=(7, 9), channels=1, num_classes=4)),  # no multiples of the patch
    "audio": (AudioAdapterConfig, dict(num_samples=50, strides=(4, 3), spectral_windows=(32, 8), num_classes=2)),
    "video": (VideoAdapterConfig, dict(image_size=8, channels=3, num_frames=3)),
    "tabular": (TabularAdapterConfig, dict(num_numbers=2, category_sizes=(3, 4))),
}


def qgfd_config(**options) -> QGFDConfig:
    sizes = dict(latent_dim=12, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24, dropout=0.0)
    return QGFDConfig(**{**sizes, **options})


def adapter_config(modality: str, **options):
    kind, fields = ADAPTERS[modality]
    return kind(**{**SMALL, **fields, **options})


def model_config(*modalities: str, backbone=None, **options) -> QGFDModelConfig:
    adapters = {modality: adapter_config(modality, **options) for modality in modalities}
    return QGFDModelConfig(backbone or qgfd_config(), **adapters)


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """With no weight that can be trained at zero, so that no branch is silent."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def make_model(*modalities: str, checkpoint=None, seed=0, **options) -> QGFDModel:
    torch.manual_seed(seed)
    if checkpoint is not None:
        options["backbone_name"] = str(checkpoint)
    return randomised(QGFDModel(model_config(*modalities, **options)))


def make_batch(modality: str, count: int = 3) -> dict:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % 2
    if modality == "text":
        return {
            "input_ids": torch.randint(20, (count, 5), generator=generator),
            "attention_mask": (torch.arange(5) < torch.tensor([5, 2, 4])[:count, None]).long(),
            "condition_ids": torch.randint(20, (count, 3), generator=generator),
        }
    if modality == "image":
        return {"pixel_values": torch.rand(count, 1, 7, 9, generator=generator) * 2 - 1, "labels": labels}
    if modality == "audio":
        waves = torch.rand(count, 41, generator=generator) - 0.5
        mask = (torch.arange(41) < torch.tensor([41, 17, 30])[:count, None]).long()
        return {"input_values": waves * mask, "attention_mask": mask, "labels": labels}
    if modality == "video":
        return {"pixel_values": torch.rand(count, 2, 3, 8, 8, generator=generator) * 2 - 1}
    numbers = torch.randn(count, 2, generator=generator)
    return {"numbers": numbers, "categories": torch.randint(3, (count, 2), generator=generator)}


def write_checkpoints(folder) -> dict:
    """Random tiny T5, ViT and Wav2Vec2 with their processors; the folder of each modality's."""
    torch.manual_seed(0)
    paths = {name: folder / name for name in ("t5", "vit", "wav2vec2")}
    t5 = T5Config(vocab_size=20, d_model=10, d_kv=4, d_ff=12, num_layers=1, num_heads=2, dropout_rate=0.1)
    T5ForConditionalGeneration(t5).save_pretrained(paths["t5"])
    tokenizer().save_pretrained(paths["t5"])
    size = dict(hidden_size=14, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12)
    ViTModel(ViTConfig(**size, image_size=8, patch_size=4)).save_pretrained(paths["vit"])
    processor = ViTImageProcessor(
        size={"height": 8, "width": 8}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.25, 0.3]
    )
    processor.save_pretrained(paths["vit"])
    speech = Wav2Vec2Config(
        **size, conv_dim=(8, 8), conv_stride=(4, 2), conv_kernel=(8, 4), num_feat_extract_layers=2,
        feat_extract_norm="layer", num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    Wav2Vec2Model(speech).save_pretrained(paths["wav2vec2"])
    Wav2Vec2FeatureExtractor(sampling_rate=8000, do_normalize=True).save_pretrained(paths["wav2vec2"])
    return {"text": paths["t5"], "image": paths["vit"], "video": paths["vit"], "audio": paths["wav2vec2"]}


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: index for index, word in enumerate(["<unk>", "<pad>", *"abcdefghijklmnopqr"])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", pad_token="<pad>")
