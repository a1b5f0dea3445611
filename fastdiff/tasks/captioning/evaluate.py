"""`fastdiff.evaluate` on a captioning model."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastdiff.data import CaptionedData, ImageData, load_data
from fastdiff.errors import section
from fastdiff.evaluation.captions import (
    CaptionScores,
    caption_scores,
    commonest_words_baseline,
    diversity,
    markdown_of,
    nearest_picture_baseline,
)
from fastdiff.files import output_path, write_atomically
from fastdiff.tasks.captioning.decoding import Captioner
from fastdiff.tasks.captioning.features import cached_features
from fastdiff.tasks.captioning.run import CaptioningRun, load_run
from fastdiff.tasks.captioning.texts import references, selected
from fastdiff.tasks.masked_lm.held_out import evenly_spaced
from fastdiff.tasks.options import DataOptions, GenerationOptions, RunOptions, at_least
from fastdiff.tasks.results import with_earlier
from fastdiff.tasks.run import finding_data
from fastdiff.tasks.texts import captions_of

_BASELINE_IMAGES = 20_000  # to train on, among which the nearest is looked for


@dataclass
class EvaluateOptions(DataOptions, RunOptions):
    """Captions held-out images and compares with what people wrote: BLEU-4, CIDEr-D, word F1 and exact match beside two
    baselines, the commonest words and the caption of the nearest training image; of data with attributes and a grammar,
    the share of captions that say each attribute rightly. With --num-samples the diversity of several captions.

    Attributes:
        num_images: held-out images captioned, spread evenly over them (default: all, at most 1000)
        num_samples: captions of each image for the diversity, drawn at temperature 1; 0 for none (default: 0)
        batch_size: captions decoded at once
        seed: seed of decoding (default: 0)
        output: path of the JSON; default: evaluation.json in the run's folder
    """

    num_images: int = 1000
    num_samples: int = 0
    batch_size: int = 64
    seed: int | None = None
    output: str | None = None
    generation: GenerationOptions = field(default_factory=GenerationOptions)

    def __post_init__(self):
        for name, least in {"num_images": 1, "batch_size": 1, "num_samples": 0}.items():
            at_least(name, getattr(self, name), least)
        if self.num_samples == 1:
            raise ValueError("--num-samples: got 1; expected 0, or 2 captions of an image or more")


def evaluate_captions(path: str, options: EvaluateOptions) -> None:
    """Scores captions of held-out images; prints tables and writes JSON."""
    run = load_run(path, weights=options.weights, device=options.device)
    if run.recipe is None:
        raise ValueError(f"{path}: got a model without a recipe; expected a run, which names its held-out images")
    output = output_path(options.output, run.folder.path / "evaluation.json")  # before work that would be lost
    given = {**options.generation, "seed": options.seed if options.seed is not None else run.decoding.get("seed", 0)}
    captioner = run.captioner(given)
    with finding_data(), section("data"):
        data = load_data(run.data_config("data", options.data_path))
    run.check_data({"data": data}, options.accept_changed_data)
    features = cached_features(data, run.vision, run.vision_config)
    captions = selected(captions_of(data), run.recipe.captions.entries)
    known, train = references(captions, "held_out"), references(captions, "train")
    captioned = torch.tensor([index for index, texts in enumerate(known) if texts])
    images = captioned[evenly_spaced(len(captioned), options.num_images)]
    found = _written(run, captioner, features, images, options.batch_size, 1)
    texts = [each[0] for each in found]
    wanted = [known[index] for index in images.tolist()]
    baselines = _baselines(features, images, train)
    scores = {"captions": caption_scores(texts, wanted),
              **{name: caption_scores(said, wanted) for name, said in baselines.items()}}  # fmt: skip
    results: dict[str, Any] = {
        "run": str(run.folder.path), "step": run.step, "weights": options.weights,
        "generation": {**run.decoding, **given}, **{name: each.to_dict() for name, each in scores.items()},
    }  # fmt: skip
    tables = [markdown_of(scores)]
    if isinstance(data, CaptionedData) and data.attributes:
        measured, table = _of_attributes(data, texts, wanted, images)
        results |= measured
        tables.append(table)
    if options.num_samples:
        drawing = run.captioner({**given, "temperature": given.get("temperature") or 1.0})
        several = _written(run, drawing, features, images, options.batch_size, options.num_samples)
        results["diversity"] = {"samples": options.num_samples, **diversity(several).to_dict()}
        tables.append("\n".join(f"{name}: {value:.3g}" for name, value in results["diversity"].items()))
    done = captioner.generator.statistics
    results |= {"forward_passes": done.forward_passes, "tokens_per_second": done.tokens_per_second}
    write_atomically(output, json.dumps(with_earlier(results, output), indent=1, default=str) + "\n")
    print("\n\n".join([*tables, f"step {run.step}, {options.weights} weights; written to {output}"]))


def _written(
    run: CaptioningRun, captioner: Captioner, features: ImageData, images: Tensor, batch_size: int, num_samples: int
) -> list[list[str]]:
    """What is written of held-out images: num_samples texts each."""
    found: list[list[str]] = []
    with tqdm(total=len(images), unit="image", desc="captioning", disable=None) as bar:
        for part in images.split(max(batch_size // num_samples, 1)):
            states = list(features.held_out.images(part))
            sizes = dict(num_samples=num_samples, batch_size=batch_size)
            each = run.captions(captioner, [""] * len(states), states, **sizes)
            found += [[sample.text for sample in samples] for samples in each]
            bar.update(len(part))
    return found


def _baselines(features: ImageData, images: Tensor, train: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """What needs no language model: the same words for every image, and the caption of the nearest image."""
    captioned = torch.tensor([index for index, texts in enumerate(train) if texts])
    nearest = captioned[evenly_spaced(len(captioned), _BASELINE_IMAGES)]
    texts = [train[index][0] for index in nearest.tolist()]
    seen = [torch.cat([part.images(some).mean(1) for some in indices.split(256)])
            for part, indices in ((features.train, nearest), (features.held_out, images))]  # fmt: skip
    words = commonest_words_baseline([texts for texts in train if texts])
    return {"commonest words": [words] * len(images), "nearest image": nearest_picture_baseline(*seen, texts)}


def _of_attributes(
    data: CaptionedData, texts: Sequence[str], wanted: Sequence[Sequence[str]], images: Tensor
) -> tuple[dict[str, Any], str]:
    """Exact match, and of data with a grammar each attribute, for all images and for combinations seen and not."""
    groups = {"all": torch.ones(len(images), dtype=torch.bool)}
    if data.seen is not None:
        groups |= {"seen": data.seen[images], "unseen": ~data.seen[images]}
    results: dict[str, dict[str, Any]] = {}
    for name, members in groups.items():
        chosen = members.nonzero().flatten().tolist()
        if not chosen:
            continue
        said = [texts[index] for index in chosen]
        scores: CaptionScores = caption_scores(said, [wanted[index] for index in chosen])
        results[name] = {"images": len(chosen), "exact_match": scores.exact_match, **_said(data, said, images[chosen])}
    columns = list(dict.fromkeys(key for values in results.values() for key in values))
    rows = [["images of combinations", *columns[1:]], ["---", *["---:"] * (len(columns) - 1)]]
    for name, values in results.items():
        rows.append([f"{name} ({values['images']})", *(f"{values[key]:.1%}" for key in columns[1:])])
    return {"attributes": results}, "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _said(data: CaptionedData, texts: Sequence[str], images: Tensor) -> dict[str, float]:
    """The share of texts that say each attribute rightly, where the data has a grammar."""
    if data.name != "shapes":
        return {}
    from fastdiff.data.shapes import parse_caption
    from fastdiff.evaluation.captions import attribute_accuracy

    values = {name: attribute.held_out[images] for name, attribute in data.attributes.items()}
    return attribute_accuracy(texts, values, parse_caption)
