"""`fastdiff.evaluate` on a masked diffusion language model."""

import dataclasses
import json
import math
from typing import Any

from tqdm import tqdm

from fastdiff.data.text_parts import TextData
from fastdiff.evaluation.likelihood import LikelihoodBound, likelihood_bound
from fastdiff.files import output_path, write_atomically
from fastdiff.generation.config import MaskedDiffusionGenerationConfig, merged_options
from fastdiff.generation.text import TextGenerator
from fastdiff.tasks.masked_lm.held_out import evenly_spaced, likelihood_arguments, likelihood_process, text_of_run
from fastdiff.tasks.masked_lm.options import EvaluateOptions
from fastdiff.tasks.masked_lm.run import (
    LanguageModel,
    decoding_defaults,
    language_model_recipe,
    load_language_model,
    load_length_predictor,
)
from fastdiff.tasks.results import results_folder, with_earlier
from fastdiff.tasks.run import finding_data
from fastdiff.training.run_folder import locate

_PAIRS, _DRAWS, _ROWS = 500, 128, 32
_ONLY_RULES = ("window", "length_heads", "length_expansion_pairs")


@dataclasses.dataclass(frozen=True)
class ExactMatch:
    """Share of held-out pairs whose generated answer is the reference, letter by letter, and its standard error.

    Both are tokens, decoded in the same way, special tokens written out.
    """

    accuracy: float
    standard_error: float
    pairs: int
    tokens_per_second: float
    forward_passes: int


def evaluate_language_model(path: str, options: EvaluateOptions) -> None:
    """Held-out likelihood, exact match of pairs, and lm-eval tasks; prints tables and writes JSON."""
    if options.length == "rules":
        from fastdiff.tasks.masked_lm.evaluate_lengths import evaluate_lengths

        return evaluate_lengths(path, options)
    for name in _ONLY_RULES:
        if getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')}: got it without --length; pass that too, or leave it out")
    recipe = language_model_recipe(path)
    held_out = options.held_out and recipe is not None
    tasks = [task.strip() for task in (options.lm_eval or "").split(",") if task.strip()]
    _check(path, options, tasks, held_out)
    longest = {} if recipe is None else {"max_new_tokens": recipe.data.max_length}
    defaults = longest | decoding_defaults(path, recipe)
    decoding = merged_options(options.decoding(), {"seed": 0, **defaults})
    config = MaskedDiffusionGenerationConfig(**decoding)
    harness = manager = None
    if tasks:
        from fastdiff.integrations import lm_eval as harness

        manager = harness.find_tasks(tasks, options.lm_eval_include_path)
    folder = results_folder(path, None if recipe is None else locate(path)[0])
    output = output_path(options.output, folder / "evaluation.json")  # before work that would be lost
    loaded = load_language_model(path, weights=options.weights, device=options.device)
    results: dict[str, Any] = {"model": path, "step": loaded.step, "weights": options.weights}
    tables = []
    if held_out:
        tables.append(_held_out(loaded, options, config, decoding, results))
    if harness is not None:
        draws = options.draws or _DRAWS
        adapter = harness.FastdiffLM(
            loaded.model,
            loaded.tokenizer,
            config,
            num_draws=draws,
            batch_size=options.batch_size or _ROWS,
            process=None if recipe is None else likelihood_process(recipe, loaded.model.config),
        )
        scores = harness.run_tasks(adapter, tasks, manager, limit=options.limit, num_fewshot=options.num_fewshot)
        results["lm_eval"] = {"draws": draws, "limit": options.limit, "generation": decoding,
                              "results": scores["results"], "n-shot": scores["n-shot"]}  # fmt: skip
        tables.append(harness.table(scores))
    results = with_earlier(results, output)
    write_atomically(output, json.dumps(results, indent=1, default=str) + "\n")
    step = "" if loaded.step is None else f"step {loaded.step}, {options.weights} weights; "
    print("\n\n".join([*tables, f"{step}written to {output}"]))


def exact_match(
    generator: TextGenerator, data: TextData, num_pairs: int, *, batch_size: int = 32, progress: bool = False
) -> ExactMatch:
    """Generates answers to held-out prompts, evenly spaced over them, and compares them with the references.

    Raises:
        ValueError: the data has no pairs, or a prompt is too long for the model.
    """
    part = data.held_out
    if part.conditions is None:
        raise ValueError("exact match: this run's data has no pairs")
    indices = evenly_spaced(len(part.targets), num_pairs).tolist()
    codec = generator.codec
    rows = [codec.as_given(part.conditions.document(i).tolist()) for i in indices]
    for index, row in zip(indices, rows, strict=True):
        generator.check(row, f"held-out prompt {index}")
    prompts, right = [generator.decode(row) for row in rows], 0
    with tqdm(total=len(rows), unit="answer", desc="exact match", disable=not progress) as bar:
        for batch in generator.generate(prompts, rows, batch_size=batch_size):
            for answer in batch:
                reference = part.targets.document(indices[answer.row]).tolist()
                pair = (codec.decode(ids, special_tokens=True) for ids in (answer.tokens, reference))
                right += answer.tokens == reference or len({*pair}) == 1
            bar.update(len(batch))
    share, done = right / len(rows), generator.statistics
    error = math.sqrt(share * (1 - share) / max(len(rows) - 1, 1))
    return ExactMatch(share, error, len(rows), done.tokens_per_second, done.forward_passes)


def _held_out(
    loaded: LanguageModel, options: EvaluateOptions, config: Any, decoding: dict[str, Any], results: dict[str, Any]
) -> str:
    """Measures the held-out text, notes it in `results` and gives the table."""
    with finding_data():
        data = text_of_run(loaded, options.accept_changed_data, options.data_path)
    recipe, rows = loaded.recipe, options.batch_size or _ROWS
    bound = likelihood_bound(
        loaded.model,
        **likelihood_arguments(recipe, loaded.model.config, data, options.likelihood_samples),
        batch_size=rows,
        progress=True,
    )
    results["likelihood"] = dataclasses.asdict(bound)
    match, count = None, _PAIRS if options.num_pairs is None else options.num_pairs
    if data.held_out.conditions is not None and count:
        generator = TextGenerator(loaded.model, loaded.tokenizer, config, load_length_predictor(loaded, config))
        match = exact_match(generator, data, count, batch_size=rows, progress=True)
        results["exact_match"] = {**dataclasses.asdict(match), "generation": decoding}
    return markdown(bound, match)


def markdown(bound: LikelihoodBound, match: ExactMatch | None = None) -> str:
    """The held-out numbers as a table."""
    rows = [
        ("held-out", "value", "standard error"),
        ("---", "---:", "---:"),
        ("bound, nats per token", f"{bound.nats_per_token:.4f}", f"{bound.standard_error:.4f}"),
        ("perplexity (bound)", f"{bound.perplexity:.2f}", f"{bound.perplexity_standard_error:.2f}"),
    ]
    if match is not None:
        rows.append((f"exact match, {match.pairs} pairs", f"{match.accuracy:.1%}", f"{match.standard_error:.1%}"))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _check(path: str, options: EvaluateOptions, tasks: list[str], held_out: bool) -> None:
    if options.lm_eval is not None and not tasks:
        raise ValueError("--lm-eval: got no task; expected names with commas between them")
    if not tasks and not held_out:
        why = "--no-held-out" if not options.held_out else f"{path} is not a run, and has no held-out text"
        raise ValueError(f"nothing to evaluate: {why}; pass --lm-eval TASKS")
