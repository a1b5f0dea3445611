"""`fastdiff.evaluate` on a run of a QGFD model: a number that means something for each modality."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import torch

from fastdiff.device import autocast_dtype
from fastdiff.evaluation.classifier import check_classifier_cache
from fastdiff.evaluation.features import batches_of, compare_with_real, encode_batches
from fastdiff.files import output_path, write_atomically
from fastdiff.recipes import load_recipe
from fastdiff.tasks.options import DataOptions, SamplingOptions, at_least
from fastdiff.tasks.qgfd.recipe import QGFDRecipe, QGFDSamplingConfig
from fastdiff.tasks.qgfd.run import QGFDRun, load_run
from fastdiff.tasks.qgfd.samples import Samples, draw_samples, label_count, table_columns
from fastdiff.tasks.qgfd.sources import Source
from fastdiff.tasks.run import finding_data
from fastdiff.training.run_folder import locate

_REAL = 4000  # real training examples that the Fréchet distance is taken of, at most


@dataclass
class EvaluateOptions(DataOptions, SamplingOptions):
    """Measures each modality: class accuracy and Fréchet distance under a small classifier (images), a classifier
    trained on synthetic rows and tested on real ones (tables), or a Fréchet distance in the encoder's space beside that
    of held-out examples.

    Attributes:
        modality: the one to measure, of a run with several; default: each of them
        num_samples: number of samples, spread evenly over classes; default: the recipe's sampling.evaluation_samples
        output: path of the JSON; default: evaluation.json in the run's folder
    """

    modality: str | None = None
    num_samples: int | None = None
    output: str | None = None

    @staticmethod
    def unfit(path: str) -> set[str]:
        """Options that mean nothing for a run: a choice where there is one modality."""
        config = locate(path)[0].config
        return {"modality"} if config.is_file() and len(load_recipe(QGFDRecipe, config).modalities) == 1 else set()

    def __post_init__(self):
        at_least("num_samples", self.num_samples, 2)


def evaluate_qgfd(path: str, options: EvaluateOptions) -> None:
    """Scores samples of a run beside real held-out examples; prints tables and writes JSON."""
    run = load_run(path, weights=options.weights, device=options.device)
    if run.recipe is None:
        raise ValueError(f"{path}: got a model without a recipe; expected a run, which names its real examples")
    modalities = run.recipe.modalities if options.modality is None else (options.modality,)
    for name in modalities:
        run.model.adapter(name)  # one that the run has
    sampling = options.applied_to(run.recipe.sampling)
    if options.num_samples is not None:
        sampling = dataclasses.replace(sampling, evaluation_samples=options.num_samples)
    # one of several has a file of its own: the others' numbers stay
    name = "evaluation.json" if modalities == run.recipe.modalities else f"evaluation_{options.modality}.json"
    output = output_path(options.output, run.folder.path / name)
    if options.data_path is not None and len(modalities) > 1:
        raise ValueError(f"--data-path: got {options.data_path!r} for {len(modalities)} modalities; pass --modality")
    with finding_data():
        sources = {name: run.source_of(name, options.accept_changed_data, options.data_path) for name in modalities}
    if "image" in sources:
        check_classifier_cache(sources["image"].data)
    report = measure_run(run, sources, sampling)
    details = {"run": str(run.folder.path), "step": run.step, "weights": options.weights}
    write_atomically(output, json.dumps({**details, **report}, indent=1) + "\n")
    print(f"\nstep {run.step}, guidance {sampling.guidance_scale:g}; written to {output}")


def measure_run(run: QGFDRun, sources: dict[str, Source], sampling: QGFDSamplingConfig) -> dict[str, Any]:
    """Measures of each modality, printed as they come; as plain values."""
    count = sampling.evaluation_samples or QGFDSamplingConfig().evaluation_samples
    dtype = autocast_dtype(run.recipe.training.mixed_precision, next(run.model.parameters()).device.type, run.model)
    report: dict[str, Any] = {"sampling": dataclasses.asdict(sampling)}
    for name, source in sources.items():
        classes, prompts = label_count(run.model, name), None
        labels = torch.arange(count) % classes if classes else None
        if source.fields.get("conditional"):
            batch = source.data.held_out.batch(torch.arange(count) % len(source.data.held_out))
            prompts = {field: batch[field] for field in ("condition_ids", "condition_mask")}
        samples = draw_samples(
            run.model, name, count, sampling, labels=labels, prompts=prompts, dtype=dtype, progress=True
        )
        measures, table = _MEASURES.get(name, _in_encoder_space)(run, name, source, samples)
        report[name] = measures
        print(f"\n{name}:\n{table}")
    return report


def _images(run: QGFDRun, name: str, source: Source, samples: Samples) -> tuple[dict[str, Any], str]:
    """Class accuracy and Fréchet distance under a small classifier, where the model is conditioned on classes."""
    from fastdiff.evaluation import evaluate_samples, load_or_train_classifier

    if samples.labels is None:
        return _in_encoder_space(run, name, source, samples)
    classifier = load_or_train_classifier(source.data)
    report = evaluate_samples(samples.batch["pixel_values"], samples.labels, source.data, classifier)
    return report.to_dict(), report.to_markdown()


def _table(run: QGFDRun, name: str, source: Source, samples: Samples) -> tuple[dict[str, Any], str]:
    """A classifier trained on the synthetic rows and tested on real ones, beside one trained on real rows."""
    from fastdiff.evaluation import train_on_synthetic_test_on_real

    report = train_on_synthetic_test_on_real(*table_columns(samples), source.data)
    return report.to_dict(), report.to_markdown()


def _text(run: QGFDRun, name: str, source: Source, samples: Samples) -> tuple[dict[str, Any], str]:
    """The Fréchet distance, which sees which tokens a text has, and a measure that sees their order."""
    from fastdiff.evaluation.token_pairs import known_pairs

    measures, table = _in_encoder_space(run, name, source, samples)
    pairs = known_pairs(samples.batch["input_ids"], source.data)
    return {**measures, "token_pairs": pairs.to_dict()}, f"{table}\n\n{pairs.to_markdown()}"


def _in_encoder_space(run: QGFDRun, name: str, source: Source, samples: Samples) -> tuple[dict[str, Any], str]:
    """Fréchet distance of the samples, decoded and encoded again, beside that of real held-out examples."""
    adapter = run.model.adapter(name)
    device = next(run.model.parameters()).device

    def encode(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        latents = adapter.encode({field: value.to(device) for field, value in batch.items()})
        return latents.tokens, latents.mask

    sampled = [dict(zip(samples.batch, parts, strict=True)) for parts in _split(samples)]
    features = [
        encode_batches(encode, batches)
        for batches in (sampled, batches_of(source.data.train, _REAL), batches_of(source.data.held_out, _REAL))
    ]
    comparison = compare_with_real(*features)
    return comparison.to_dict(), comparison.to_markdown()


def _split(samples: Samples) -> Any:
    return zip(*(value.split(64) for value in samples.batch.values()), strict=True)


_MEASURES = {"text": _text, "image": _images, "tabular": _table}
