"""Samples of QGFD models as files that people look at or listen to."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastdiff.data import TableSchema, TabularData
from fastdiff.data.tokenization import check_text, decode_ids, encode_texts
from fastdiff.device import autocast_dtype
from fastdiff.diffusion.sampler_config import check_sampler
from fastdiff.files import write_atomically
from fastdiff.models.qgfd.model import QGFDModel
from fastdiff.tasks.qgfd.recipe import QGFDRecipe, QGFDSamplingConfig
from fastdiff.tasks.qgfd.sources import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# samples shown where nobody says how many: of each class, or in all where there are no classes
_OF_A_CLASS = {"image": 8, "audio": 1, "video": 1}
_UNLABELLED = {"text": 6, "image": 40, "audio": 10, "video": 8, "tabular": 500}
SUFFIXES = (".png", ".txt", ".wav", ".gif", ".csv")  # of the files that samples come as
_BATCH = 100
_SHOWN_VIDEOS = 10  # rows of a contact sheet


@dataclass(frozen=True)
class Shown:
    """What samples of a modality are shown with.

    Attributes:
        class_names: names by label; () where there are none.
        tokenizer: the tokenizer of text.
        ends: whether a text ends at its first EoS: answers do, windows of documents do not.
        schema: the columns of a table.
        real: real rows, by column, to be drawn beside the samples'.
        prompts: prompts of conditional text: {"condition_ids", "condition_mask"}, one for each of some samples.
    """

    class_names: tuple[str, ...] = ()
    tokenizer: "PreTrainedTokenizerBase | None" = None
    ends: bool = False
    schema: TableSchema | None = None
    real: Mapping[str, np.ndarray] | None = None
    prompts: Mapping[str, Tensor] | None = None

    @classmethod
    def of_source(cls, source: Source) -> "Shown":
        """What a data set shows: the real rows are those to train on, the prompts the first held-out ones."""
        data = source.data
        if isinstance(data, TabularData):
            return cls(schema=data.schema, real=data.table(data.train))
        prompts = None
        if source.fields.get("conditional"):
            batch = data.held_out.batch(range(min(_UNLABELLED["text"], len(data.held_out))))
            prompts = {name: batch[name] for name in ("condition_ids", "condition_mask")}
        return cls(data.class_names, source.processor, prompts is not None, prompts=prompts)


@dataclass(frozen=True)
class Samples:
    """Samples of one modality, decoded.

    Attributes:
        batch: as the modality's adapter takes it.
        labels: [N] the classes asked for; None where there are none.
        guided: whether there was a condition, which classifier-free guidance is about.
    """

    batch: dict[str, Tensor]
    labels: Tensor | None = None
    guided: bool = False

    def __len__(self) -> int:
        return len(next(iter(self.batch.values())))


def label_count(model: QGFDModel, modality: str) -> int:
    """The number of classes that a modality is conditioned on; 0 for none."""
    return model.adapter(modality).config.num_classes or 0


def default_labels(model: QGFDModel, modality: str, shown: Shown, num_samples: int | None) -> tuple[int, Tensor | None]:
    """How many samples are shown, and their labels: every class in turn of the names, or None without classes."""
    classes = label_count(model, modality)
    if not classes:
        known = len(shown.real[shown.schema.names[0]]) if shown.real is not None else _UNLABELLED[modality]
        if shown.prompts is not None:
            known = len(shown.prompts["condition_ids"])
        return num_samples or known, None
    labels = torch.arange(classes).repeat_interleave(num_samples or _OF_A_CLASS[modality])
    return len(labels), labels


def draw_samples(
    model: QGFDModel,
    modality: str,
    count: int,
    sampling: QGFDSamplingConfig,
    *,
    labels: Tensor | None = None,
    prompts: Mapping[str, Tensor] | None = None,
    length: int | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
    keep: Callable[[Samples], object] | None = None,
) -> Samples:
    """Draws `count` samples and decodes them; sample i depends on its condition and on seed + i alone.

    Args:
        labels: [count], where the modality has classes; None is the null label.
        prompts: prompts of conditional text, cycled through.
        length: length of a sample, in the modality's unit; None is the model's.
        dtype: dtype of autocast; None is float32.
        keep: gets the samples drawn so far after each batch but the last (`fastdiff.tasks.results.AsTheyCome`).

    Raises ValueError for conditions, length or sampler that do not fit the model.
    """
    check_sampler(sampling, model.diffusion, count)
    conditions: dict[str, Tensor] = {} if labels is None else {"labels": labels}
    if prompts is not None:
        chosen = torch.arange(count) % len(prompts["condition_ids"])
        conditions |= {name: value[chosen] for name, value in prompts.items()}
    parts: list[dict[str, Tensor]] = []
    with tqdm(total=count, unit="sample", desc=f"sampling {modality}", disable=not progress) as bar:
        for start in range(0, count, _BATCH):
            size = min(_BATCH, count - start)
            batch = model.sample(
                modality,
                size,
                {name: value[start : start + size] for name, value in conditions.items()},
                length=length,
                num_inference_steps=sampling.num_inference_steps,
                guidance_scale=sampling.guidance_scale if conditions else 1.0,
                guidance_interval=sampling.guidance_interval,
                seed=sampling.seed + start,
                autocast_dtype=dtype,
                **sampling.options(),
            )
            parts.append({name: value.float().cpu() if value.is_floating_point() else value.cpu()
                          for name, value in batch.items()})  # fmt: skip
            bar.update(size)
            if keep is not None and start + size < count:
                keep(_joined(parts, labels, bool(conditions)))
    return _joined(parts, labels, bool(conditions))


def _joined(parts: Sequence[Mapping[str, Tensor]], labels: Tensor | None, guided: bool) -> Samples:
    batch = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Samples(batch, None if labels is None else labels[: len(next(iter(batch.values())))], guided)


def save_samples(
    samples: Samples, model: QGFDModel, modality: str, shown: Shown, stem: Path, title: str | None = None
) -> list[Path]:
    """Writes samples as files named `stem` with a suffix each, the picture first where there is one.

    Text: PNG and TXT; images: PNG; sound: PNG (spectrograms) and WAV; videos: PNG (frames) and GIF; tables: PNG
    (marginals beside the real ones, where those are known) and CSV. Raises OSError where one cannot be written.
    """
    return _WRITERS[modality](samples, model, shown, stem, title)


def encode_prompts(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> dict[str, Tensor]:
    """Texts to condition on, as `Shown.prompts` has them. Raises ValueError for one without tokens."""
    for text in texts:
        check_text(text)
    rows = encode_texts(tokenizer, list(texts))
    for text, ids in zip(texts, rows, strict=True):
        if not ids:
            raise ValueError(f"prompt: got {text!r}, which has no tokens; expected some text")
    longest, pad = max(map(len, rows)), tokenizer.pad_token_id or 0
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    mask = torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]
    return {"condition_ids": ids, "condition_mask": mask}


def texts_of(samples: Samples, shown: Shown) -> list[str]:
    """The texts of samples; an answer ends before its first EoS."""
    texts = []
    for ids, mask in zip(samples.batch["input_ids"].tolist(), samples.batch["attention_mask"].tolist(), strict=True):
        ids = [token for token, seen in zip(ids, mask, strict=True) if seen]
        if shown.ends and shown.tokenizer.eos_token_id in ids:
            ids = ids[: ids.index(shown.tokenizer.eos_token_id)]
        texts.append(decode_ids(shown.tokenizer, ids))
    return texts


def preview_samples(model: QGFDModel, shown: Mapping[str, Shown], recipe: QGFDRecipe, path: Path) -> None:
    """Files of samples of each modality beside `path`, and all of their pictures, one below the other, in it."""
    sampling, device = recipe.sampling, next(model.parameters()).device
    pictures = []
    for name, each in shown.items():
        count, labels = default_labels(model, name, each, sampling.num_samples)
        samples = draw_samples(
            model, name, count, sampling, labels=labels, prompts=each.prompts,
            dtype=autocast_dtype(recipe.training.mixed_precision, device.type),
        )  # fmt: skip
        stem = path.with_suffix("") if len(shown) == 1 else path.with_name(f"{path.stem}_{name}")
        title = sampling_title(samples, sampling, modality=name if len(shown) > 1 else None)
        pictures.append(save_samples(samples, model, name, each, stem, title)[0])
    if len(shown) > 1:
        _stack(pictures, path)


def sampling_title(
    samples: Samples, sampling: QGFDSamplingConfig, step: int | None = None, modality: str | None = None
) -> str:
    """What stands above a picture of samples."""
    described = sampling.described(step, guided=samples.guided)
    return described if modality is None else f"{modality}, {described}"


def _text_files(samples: Samples, model: QGFDModel, shown: Shown, stem: Path, title: str | None) -> list[Path]:
    from fastdiff.visualization import TextSample, save_text_samples

    texts, prompts = texts_of(samples, shown), [""] * len(samples)
    if shown.prompts is not None:
        rows = zip(shown.prompts["condition_ids"], shown.prompts["condition_mask"], strict=True)
        given = [decode_ids(shown.tokenizer, ids[mask].tolist(), special_tokens=True) + " → " for ids, mask in rows]
        prompts = [given[index % len(given)] for index in range(len(samples))]
    pieces = [TextSample(prompt, [text], [0]) for prompt, text in zip(prompts, texts, strict=True)]
    png = save_text_samples(pieces[: _UNLABELLED["text"]], _suffixed(stem, ".png"), title=title)
    txt = _suffixed(stem, ".txt")
    numbered = enumerate(zip(prompts, texts, strict=True), start=1)
    write_atomically(txt, "\n".join(f"--- {number} ---\n{prompt}{text}" for number, (prompt, text) in numbered) + "\n")
    return [png, txt]


def _image_files(samples: Samples, model: QGFDModel, shown: Shown, stem: Path, title: str | None) -> list[Path]:
    from fastdiff.visualization import save_sample_grid

    labels, names = samples.labels, shown.class_names
    if labels is None:
        labels, names = torch.zeros(len(samples), dtype=torch.long), ("",)
    return [save_sample_grid(samples.batch["pixel_values"], labels, names, _suffixed(stem, ".png"), title=title)]


def _audio_files(samples: Samples, model: QGFDModel, shown: Shown, stem: Path, title: str | None) -> list[Path]:
    from fastdiff.visualization import save_spectrograms, save_wav

    rate, waves = model.adapter("audio").config.sampling_rate, samples.batch["input_values"]
    png = save_spectrograms(waves, rate, _suffixed(stem, ".png"), names=_names(samples, shown), title=title)
    return [png, save_wav(waves, rate, _suffixed(stem, ".wav"))]


def _video_files(samples: Samples, model: QGFDModel, shown: Shown, stem: Path, title: str | None) -> list[Path]:
    from fastdiff.visualization import save_contact_sheet, save_video_gif

    videos, names = samples.batch["pixel_values"], _names(samples, shown)
    png = save_contact_sheet(
        videos[:_SHOWN_VIDEOS], _suffixed(stem, ".png"), names=names and names[:_SHOWN_VIDEOS], title=title
    )
    return [png, save_video_gif(videos, _suffixed(stem, ".gif"), columns=5)]


def _table_files(samples: Samples, model: QGFDModel, shown: Shown, stem: Path, title: str | None) -> list[Path]:
    from fastdiff.visualization import save_marginals, save_table_csv

    table = shown.schema.decode(*table_columns(samples))
    written = [save_table_csv(table, _suffixed(stem, ".csv"))]
    if shown.real is not None:
        written.insert(0, save_marginals(shown.real, table, _suffixed(stem, ".png"), title=title))
    return written


_WRITERS = {
    "text": _text_files,
    "image": _image_files,
    "audio": _audio_files,
    "video": _video_files,
    "tabular": _table_files,
}


def table_columns(samples: Samples) -> tuple[Tensor, Tensor]:
    """Numbers [R, N] and ids of categories [R, K] of sampled rows; N or K may be 0."""
    rows = len(samples)
    numbers = samples.batch.get("numbers", torch.empty(rows, 0))
    return numbers, samples.batch.get("categories", torch.empty(rows, 0, dtype=torch.long))


def _names(samples: Samples, shown: Shown) -> list[str] | None:
    return None if samples.labels is None else [shown.class_names[label] for label in samples.labels.tolist()]


def _suffixed(stem: Path, suffix: str) -> Path:
    return stem.with_name(stem.name + suffix)


def _stack(pictures: list[Path], path: Path) -> None:
    """Pictures one below the other, the wider ones scaled down to a common width."""
    from PIL import Image

    images = [Image.open(picture).convert("RGB") for picture in pictures]
    width = min(1200, max(image.width for image in images))
    images = [image.resize((width, round(image.height * width / image.width))) if image.width > width else image
              for image in images]  # fmt: skip
    sheet = Image.new("RGB", (width, sum(image.height for image in images)), "white")
    top = 0
    for image in images:
        sheet.paste(image, ((width - image.width) // 2, top))
        top += image.height
    content = io.BytesIO()
    sheet.save(content, format="png")
    write_atomically(path, content.getvalue())
