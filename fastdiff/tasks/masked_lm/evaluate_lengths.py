"""`fastdiff evaluate runs/x --length`: how well each rule bounds the lengths of held-out answers."""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastdiff.data.text_parts import TextData
from fastdiff.evaluation.length_comparison import Pair, RuleComparison, compare_rule, read_rules
from fastdiff.files import output_path, write_atomically
from fastdiff.generation.length import LengthPredictor
from fastdiff.generation.length.calibration import CALIBRATION_FILE, check_coverage, pairs_needed, save_calibrations
from fastdiff.generation.length.rules import EXPANSION_RULES, LENGTH_RULES
from fastdiff.tasks.masked_lm.held_out import evenly_spaced, text_of_run
from fastdiff.tasks.masked_lm.length_report import LengthReport
from fastdiff.tasks.masked_lm.options import EvaluateOptions
from fastdiff.tasks.masked_lm.run import LanguageModel, language_model_recipe, load_language_model
from fastdiff.tasks.results import with_earlier
from fastdiff.tasks.run import finding_data
from fastdiff.training.run_folder import locate

# Fields of `LengthOptions` and the options of the command that set them.
_OPTIONS = {"window": "window", "coverage": "coverage", "num_pairs": "num_pairs", "heads": "length_heads",
            "expansion_pairs": "length_expansion_pairs", "batch_size": "batch_size", "seed": "seed"}  # fmt: skip
# any other one that is given is refused
_USED = {"weights", "device", "output", "length", "accept_changed_data", "data_path", *_OPTIONS.values()}
RESAMPLES = 1000


@dataclass(frozen=True)
class LengthOptions:
    """Options of the evaluation, checked.

    Attributes:
        window: tokens of an answer with its EoS; None: data.max_length of the run's recipe.
        coverage: the coverage that the rules are calibrated for.
        num_pairs: held-out pairs, evenly spaced; one half calibrates, the other half is measured.
        expansion_pairs: how many of them are for "daedal" and "rho", which make many passes; 0 leaves these out.
        heads: runs of learned heads, at most one of a kind.
        batch_size: prompts per forward pass.
        seed: seed of the split into halves and of the bootstrap.
    """

    window: int | None = None
    coverage: float = 0.95
    num_pairs: int = 2000
    expansion_pairs: int = 400
    heads: tuple[str, ...] = ()
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self):
        check_coverage(self.coverage)
        least = {"window": 1, "num_pairs": 2, "batch_size": 1, "expansion_pairs": 0, "seed": 0}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                option = _OPTIONS[name].replace("_", "-")
                raise ValueError(f"--{option}: got {value}; expected at least {lowest}")
        if self.seed >= 2**64:
            raise ValueError(f"--seed: got {self.seed}; expected at most {2**64 - 1} (torch has no larger)")


def evaluate_lengths(path: str, given: EvaluateOptions) -> None:
    """Calibrates and measures every rule; prints a table, writes table, JSON, two pictures and the calibrations."""
    options, recipe = length_options(given), language_model_recipe(path)
    if recipe is None:
        raise ValueError(f"--length: {path} is not a run, and has no held-out pairs; expected a run's folder")
    if recipe.data.sample == "documents":
        raise ValueError(
            f"--length: {path} was trained on documents, which have no prompts and answers; expected a run on pairs"
        )
    output = output_path(given.output, locate(path)[0].path / "evaluation.json")
    loaded = load_language_model(path, weights=given.weights, device=given.device)
    if not os.access(loaded.source, os.W_OK):
        raise PermissionError(f"{loaded.source} cannot be written; the calibrations belong there")
    options = dataclasses.replace(options, window=options.window or recipe.data.max_length)
    predictors = make_predictors(loaded, options)
    with finding_data():
        text = text_of_run(loaded, given.accept_changed_data, given.data_path)
    calibration, test = held_out_halves(loaded, text, options)
    rules = compare(predictors, calibration, test, loaded, options)
    calibrations = "calibrations: none saved, since they are for the averaged weights"
    if given.weights == "ema":  # that generate --length auto reads
        calibrations = f"calibrations, for `generate --length auto`, to {_save(loaded, rules)}"
    report = LengthReport(
        rules, options.window, predictors[0].length_format, options.coverage, len(calibration), options.seed, RESAMPLES
    )
    results = {"model": path, "step": loaded.step, "weights": given.weights}
    results["length"] = report.to_dict()
    origin = f"{path}, step {loaded.step}, {given.weights} weights"
    write_atomically(output, json.dumps(with_earlier(results, output), indent=1, default=str) + "\n")
    write_atomically(output.with_name("length.md"), f"# Length prediction: {origin}\n\n{report.to_markdown()}\n")
    report.save_pictures(output.parent)
    print(
        f"{report.to_markdown(brief=True)}\n\n{origin}; written to {output}; length.md (all columns), "
        f"length_predictions.png and length_tradeoff.png beside it;\n{calibrations}"
    )


def _save(loaded: LanguageModel, rules: Sequence[RuleComparison]) -> Path:
    file = loaded.source / CALIBRATION_FILE
    if file.is_file():
        print(f"{file}: replaced; the calibrations that were there are gone", file=sys.stderr)
    try:
        save_calibrations(file, [rule.calibration for rule in rules])
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from None
    return file


def length_options(given: EvaluateOptions) -> LengthOptions:
    """The options of a command line. Raises ValueError, naming one that is out of range or has no use here."""
    defaults = EvaluateOptions()
    others = {**vars(given), **given.generation}
    others = {name: value for name, value in others.items() if value != getattr(defaults, name, None)}
    for name, value in others.items():
        if name in _USED or name == "generation":
            continue
        option = ("--no-" if value is False else "--") + name.replace("_", "-")
        raise ValueError(f"{option}: got it with --length, an evaluation of its own; leave one of them out")
    values = {field: getattr(given, option) for field, option in _OPTIONS.items()}
    values["heads"] = None if given.length_heads is None else tuple(given.length_heads)
    return LengthOptions(**{field: value for field, value in values.items() if value is not None})


def make_predictors(loaded: LanguageModel, options: LengthOptions) -> list[LengthPredictor]:
    """A predictor for each rule that there is something for, uncalibrated.

    Raises FileNotFoundError, ValueError: the model's config names no length format or end token, or a head does not
    fit.
    """
    heads = {}
    if options.heads:
        from fastdiff.tasks.length_head.run import load_length_head

        for path in options.heads:
            head = load_length_head(path, loaded.model)
            if head.kind in heads:
                raise ValueError(f"--length-heads: {path} is a second {head.kind}; expected at most one of a kind")
            heads[head.kind] = head
    left_out = {"classifier", "regression"} - heads.keys()
    left_out |= set() if options.expansion_pairs else set(EXPANSION_RULES)
    common = {"window": options.window, "coverage": options.coverage}
    return [
        LengthPredictor(loaded.model, rule=rule, head=heads.get(rule), **common)
        for rule in LENGTH_RULES
        if rule not in left_out
    ]


def held_out_halves(loaded: LanguageModel, data: TextData, options: LengthOptions) -> tuple[list[Pair], list[Pair]]:
    """Pairs to calibrate with and pairs to test on: a fixed permutation's first half, rounded up, and its other half.

    Raises ValueError where they are too few for the coverage, or a prompt leaves no room for the window.
    """
    part, needed = data.held_out, pairs_needed(options.coverage)
    indices = evenly_spaced(len(part.targets), options.num_pairs)
    expansion = min(options.expansion_pairs, len(indices))
    for option, count in (("num-pairs", len(indices)), ("length-expansion-pairs", expansion)):
        if (count or option == "num-pairs") and (count < 2 or -(-count // 2) < needed):
            there = f"; the run holds out {len(part.targets)}" if len(part.targets) < 2 * needed else ""
            raise ValueError(
                f"--{option}: {count} pairs leave {-(-count // 2)} to calibrate with; coverage {options.coverage:g} "
                f"needs {needed}, one half of {2 * needed} pairs{there}: pass more, or a lower --coverage"
            )
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(options.seed))
    pairs = []
    for index in indices[order].tolist():
        prompt = part.conditions.document(index).tolist()
        check_prompt(loaded.model, len(prompt), options.window, f"held-out prompt {index}")
        pairs.append((prompt, part.targets.document(index).tolist()))
    half = -(-len(pairs) // 2)
    return pairs[:half], pairs[half:]


def check_prompt(model: torch.nn.Module, length: int, window: int, name: str) -> None:
    """Raises ValueError where a prompt of `length` tokens and the window have no place in the model's positions."""
    longest = model.config.max_position_embeddings
    before = 1 if model.config.num_encoder_layers else length
    if max(length, before + window) > longest:
        raise ValueError(
            f"--window: got {window}, and {name} has {length} tokens; expected at most {longest} together, the model's "
            "positions: pass a smaller --window"
        )


def compare(
    predictors: Sequence[LengthPredictor],
    calibration: Sequence[Pair],
    test: Sequence[Pair],
    loaded: LanguageModel,
    options: LengthOptions,
) -> list[RuleComparison]:
    """Each rule on these pairs, in the order of the predictors."""
    compared = {}
    for expanding in (False, True):
        chosen = [predictor for predictor in predictors if (predictor.rule in EXPANSION_RULES) == expanding]
        most = options.expansion_pairs if expanding else len(calibration) + len(test)
        first, second = calibration[: -(-most // 2)], test[: max(most // 2, 1)]
        if not chosen:
            continue
        pairs = [*first, *second]
        for readings in read_rules(chosen, pairs, batch_size=options.batch_size, progress=True):
            settings = {"resamples": RESAMPLES, "seed": options.seed}
            compared[readings.predictor.rule] = compare_rule(
                readings, len(first), options.coverage, loaded.tokenizer, **settings
            )
    return [compared[predictor.rule] for predictor in predictors]
