"""`fastdiff.evaluate` on a text-to-image model."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastdiff.data import CaptionedData, ImageData, load_data
from fastdiff.data.captions import Part
from fastdiff.errors import section
from fastdiff.files import output_path, write_atomically
from fastdiff.tasks.options import DataOptions, SamplingOptions, at_least
from fastdiff.tasks.run import finding_data
from fastdiff.tasks.text_to_image.drawing import Conditions
from fastdiff.tasks.text_to_image.recipe import TextToImageSamplingConfig
from fastdiff.tasks.text_to_image.run import TextToImageRun, load_run

if TYPE_CHECKING:
    from fastdiff.evaluation import RetrievalReport

Measured = tuple[Tensor, dict[str, Any], str]  # samples of what was trained on, what is measured, and as a table
_CANDIDATES = 100  # images among which a sample is to find its own


@dataclass
class EvaluateOptions(DataOptions, SamplingOptions):
    """Scores samples beside real held-out images: whether they show what the prompts say, under small classifiers that
    are trained once on the real images and cached; Fréchet distances; and the distance to the nearest training image.

    Attributes:
        num_samples: number of samples, spread evenly over what is drawn
        output: path of the JSON; default: evaluation.json in the run's folder
    """

    num_samples: int = 500
    output: str | None = None

    def __post_init__(self):
        at_least("num_samples", self.num_samples, 2)


def load_data_of(run: TextToImageRun, data_path: str | None = None, accept_changed: bool = False) -> ImageData:
    """The data that a run was trained on.

    Raises ValueError for a model without a recipe, and for other data than it was; and what `load_data` raises.
    """
    if run.recipe is None:
        raise ValueError(f"{run.source}: got a model without a recipe; expected a run, which names its real images")
    with finding_data(), section("data"):
        data = load_data(run.data_config("data", data_path))
    run.check_data({"data": data}, accept_changed)
    return data


def evaluate_prompted(path: str, options: EvaluateOptions) -> None:
    """Scores samples of a run beside real held-out images; prints tables and writes JSON."""
    run = load_run(path, weights=options.weights, device=options.device)
    data = load_data_of(run, options.data_path, options.accept_changed_data)
    output = output_path(options.output, run.folder.path / "evaluation.json")
    sampling = options.applied_to(run.sampling)
    run.check_pictures()
    run.check_sampling(sampling, options.num_samples)  # before a classifier is trained
    results: dict[str, Any] = {
        "run": str(run.folder.path),
        "step": run.step,
        "weights": options.weights,
        "guidance_scale": sampling.guidance_scale,
        "num_inference_steps": sampling.num_inference_steps,
        "seed": sampling.seed,
        **sampling.options(),
    }
    for measures, table in _measured(run, data, sampling, options.num_samples):
        results |= measures
        write_atomically(output, json.dumps(results, indent=1) + "\n")  # first: who reads the tables may have gone
        print(f"{table}\n", flush=True)
    print(f"step {run.step}, guidance {sampling.guidance_scale:g}; written to {output}")


def _measured(
    run: TextToImageRun, data: ImageData, sampling: TextToImageSamplingConfig, count: int
) -> Iterator[tuple[dict[str, Any], str]]:
    """What fits the data, one after the other: plain values and a table."""
    by_texts = isinstance(data, CaptionedData) and not data.attributes
    has_network = _check_network(needed=by_texts)
    draw = _of_texts if by_texts else _of_attributes if isinstance(data, CaptionedData) else _of_classes
    samples, measures, table = draw(run, data, sampling, count)
    yield measures, table
    if has_network:
        yield _in_network_features(samples, data)


def _check_network(needed: bool) -> bool:
    """Whether EfficientNet-Lite0 is installed; asked before minutes of work. Raises ModuleNotFoundError if needed."""
    from fastdiff.evaluation import image_features

    try:
        image_features(torch.zeros(1, 3, 8, 8))
    except ModuleNotFoundError as error:
        if needed:
            raise
        print(f"{error}; until then no Fréchet distance in its features", file=sys.stderr)
        return False
    return True


def _of_attributes(
    run: TextToImageRun, data: CaptionedData, sampling: TextToImageSamplingConfig, count: int
) -> Measured:
    """Half of the samples are of combinations that were trained on, half of those that never were."""
    from fastdiff.evaluation import evaluate_attributes, evaluate_samples, load_or_train_classifier
    from fastdiff.evaluation.classifier import CLASS

    unseen = combination_prompts(data, count // 2, seen=False)
    seen = combination_prompts(data, count - len(unseen[0]), seen=True)
    conditions = run.conditions([*seen[0], *unseen[0]])
    wanted = {name: torch.cat([seen[1][name], unseen[1][name]]) for name in data.attributes}
    classifier = load_or_train_classifier(data)
    samples = run.decoded(run.draw(conditions, sampling, progress=True))
    report = evaluate_attributes(samples, wanted, data, classifier)
    of_seen = samples[: len(seen[0])]
    measures, table = {"attributes": report.to_dict()}, report.to_markdown()
    if CLASS in wanted:
        classes = evaluate_samples(of_seen, wanted[CLASS][: len(seen[0])], data, classifier)
        measures["seen"] = classes.to_dict()
        table += f"\n\nof seen combinations:\n\n{classes.to_markdown()}"
    return of_seen, measures, table


def combination_prompts(data: CaptionedData, count: int, seen: bool) -> tuple[list[str], dict[str, Tensor]]:
    """Texts that say all attributes, of combinations spread evenly over those that were trained on, or over the others.

    Returns the texts, [n], and the values that they ask for, int64 [n] by attribute; n is 0 where there are none.
    """
    names = list(data.attributes)
    known = data.combinations(names, seen=seen)
    said = [(combination, texts_of(data, combination)) for combination in spread(known, count)]
    said = [(combination, texts) for combination, texts in said if texts]
    prompts, values = [], []
    for index in range(count if said else 0):
        combination, texts = said[index % len(said)]
        prompts.append(texts[index // len(said) % len(texts)])
        values.append([combination[name] for name in names])
    table = torch.tensor(values, dtype=torch.int64).view(-1, len(names))
    return prompts, dict(zip(names, table.unbind(1), strict=True))


def spread(entries: Sequence[Any], count: int) -> list[Any]:
    """So many of some entries, or all where there are fewer, spread evenly over them."""
    count = min(count, len(entries))
    return [entries[index * len(entries) // count] for index in range(count)]


def texts_of(data: CaptionedData, combination: Mapping[str, int]) -> tuple[str, ...]:
    """The texts that say all of a combination of attributes: captions, where held-out images have such."""
    entries = data.captions.entries
    if "caption" in entries and bool((data.captions.rows("held_out", ("caption",)) >= 0).any()):
        entries = ("caption",)
    return data.prompts_of(combination, entries=entries)


def _of_texts(run: TextToImageRun, data: CaptionedData, sampling: TextToImageSamplingConfig, count: int) -> Measured:
    """Samples of texts of images to train on, and of held-out ones: is the right image the nearest among some?"""
    measures: dict[str, Any] = {}
    tables, samples = [], None
    asked = {part: _asked(run, data, count, part) for part in ("train", "held_out")}  # all texts before any sample
    for part, (conditions, indices) in asked.items():
        drawn = run.decoded(run.draw(conditions, sampling, progress=True))
        samples = drawn if samples is None else samples
        if len(indices) >= 2:
            chosen = torch.tensor(spread(range(len(indices)), _CANDIDATES))
            report = _retrieval(drawn[chosen], getattr(data, part).images(indices[chosen]))
            measures[f"retrieval_{part}"] = {k: v for k, v in report.to_dict().items() if k != "nearest"}
            tables.append(f"texts of {part.replace('_', '-')} images:\n\n{report.to_markdown()}")
    nearest = {
        "samples": _nearest(samples, data),
        "held_out": _nearest(data.held_out.images(torch.arange(min(count, len(data.held_out)))), data),
    }
    rows = [
        f"| {name.replace('_', '-')} | {each['median']:.2f} | {each['smallest']:.2f} |"
        for name, each in nearest.items()
    ]
    head = "| nearest training image, pixel distance | median | smallest |\n| --- | ---: | ---: |"
    return samples, measures | {"nearest_training_image": nearest}, "\n\n".join([*tables, "\n".join([head, *rows])])


def _asked(run: TextToImageRun, data: CaptionedData, count: int, part: Part) -> tuple[Conditions, Tensor]:
    """The first text of each of some images of a part, spread evenly over it; and the images' indices.

    Of images that share a text, as others do, the first alone is taken.
    """
    rows = data.captions.rows(part).long()
    first = rows.gather(1, (rows >= 0).int().argmax(1, keepdim=True))[:, 0]
    texts, images = {}, []
    for index, text in enumerate(first.tolist()):
        if text >= 0 and text not in texts:
            texts[text] = data.captions.texts[text]
            images.append(index)
    return run.conditions(spread(list(texts.values()), count)), torch.tensor(spread(images, count))


def _retrieval(samples: Tensor, images: Tensor) -> "RetrievalReport":
    from fastdiff.evaluation import evaluate_retrieval, image_features

    features = [image_features(each, progress=True) for each in (samples, images)]
    return evaluate_retrieval(*features, torch.arange(len(samples)))


def _nearest(images: Tensor, data: ImageData) -> dict[str, float]:
    from fastdiff.evaluation import nearest_images

    _, distances = nearest_images(images.clamp(-1, 1), data.train)
    return {"median": float(distances.median()), "smallest": float(distances.min())}


def _of_classes(run: TextToImageRun, data: ImageData, sampling: TextToImageSamplingConfig, count: int) -> Measured:
    """Samples of the classes' names under a classifier."""
    from fastdiff.evaluation import evaluate_samples, load_or_train_classifier

    classifier = load_or_train_classifier(data)
    labels = torch.arange(count) % len(data.class_names)
    names = [data.class_names[label] for label in labels.tolist()]
    samples = run.decoded(run.draw(run.conditions(names), sampling, progress=True))
    report = evaluate_samples(samples, labels, data, classifier)
    return samples, report.to_dict(), report.to_markdown()


def _in_network_features(samples: Tensor, data: ImageData) -> tuple[dict[str, Any], str]:
    """Fréchet distances in EfficientNet-Lite0's features, beside those of real images."""
    from fastdiff.evaluation import compare_images

    comparison = compare_images(samples, data, progress=True)
    return {"efficientnet_lite0": comparison.to_dict()}, comparison.to_markdown()
