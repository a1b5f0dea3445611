"""`python -m fastdiff.evaluate` on a masked diffusion language model."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastdiff.data.text_parts import TextData
from fastdiff.evaluation.likelihood import LikelihoodBound, likelihood_bound
from fastdiff.files import output_path, write_atomically
from fastdiff.generation.config import MaskedDiffusionGenerationConfig
from fastdiff.generation.options import generation_options
from fastdiff.generation.text import TextGenerator
from fastdiff.training.held_out import evenly_spaced, likelihood_arguments, likelihood_process, text_of_run
from fastdiff.training.runs import LanguageModel, language_model_recipe, load_language_model, load_length_predictor

DEFAULT_PAIRS, DEFAULT_DRAWS = 500, 128


@dataclasses.dataclass(frozen=True)
class ExactMatch:
    """Share of held-out pairs whose generated answer is the reference, letter by letter, and its standard error."""

    accuracy: float
    standard_error: float
    pairs: int
    tokens_per_second: float
    forward_passes: int


def evaluate_language_model(arguments: Any) -> None:
    """Held-out likelihood, exact match of pairs, and lm-eval tasks; prints tables and writes JSON."""
    recipe = language_model_recipe(arguments.run)
    held_out = arguments.held_out and recipe is not None
    tasks = [task.strip() for task in (arguments.lm_eval or "").split(",") if task.strip()]
    _check(arguments, tasks, held_out)
    defaults = {} if recipe is None else {"max_new_tokens": recipe.data.max_length, **recipe.sampling.generation}
    options = generation_options(arguments, {"seed": 0, **defaults})
    config = MaskedDiffusionGenerationConfig(**options)
    harness = manager = None
    if tasks:
        from fastdiff.integrations import lm_eval as harness

        manager = harness.find_tasks(tasks, arguments.lm_eval_include_path)
    default = Path("evaluation.json") if recipe is None else run_folder(arguments.run) / "evaluation.json"
    output = output_path(arguments.output, default)  # before work that would be lost
    loaded = load_language_model(arguments.run, weights=arguments.weights, device=arguments.device)
    results: dict[str, Any] = {"model": str(arguments.run), "step": loaded.step, "weights": arguments.weights}
    tables = []
    if held_out:
        tables.append(_held_out(loaded, arguments, config, options, results))
    if harness is not None:
        adapter = harness.FastdiffLM(
            loaded.model,
            loaded.tokenizer,
            config,
            num_draws=arguments.draws,
            batch_size=arguments.batch_size,
            process=None if recipe is None else likelihood_process(recipe, loaded.model.config),
        )
        scores = harness.run_tasks(
            adapter,
            tasks,
            manager,
            limit=arguments.limit,
            num_fewshot=arguments.num_fewshot,
        )
        results["lm_eval"] = {"draws": arguments.draws, "limit": arguments.limit, "generation": options,
                              "results": scores["results"], "n-shot": scores["n-shot"]}  # fmt: skip
        tables.append(harness.table(scores))
    results = with_earlier(results, output)
    write_atomically(output, json.dumps(results, indent=1, default=str) + "\n")
    step = "" if loaded.step is None else f"step {loaded.step}, {arguments.weights} weights; "
    print("\n\n".join([*tables, f"{step}written to {output}"]))


def with_earlier(results: dict[str, Any], output: Path) -> dict[str, Any]:
    """What an earlier call measured of the same weights stays in the file."""
    try:
        earlier = json.loads(output.read_text())
    except (OSError, ValueError):  # there is none, or it is no result
        return results
    same = isinstance(earlier, dict) and all(
        earlier.get(name) == results.get(name) for name in ("run", "model", "step", "weights")
    )
    return {**earlier, **results} if same else results


def exact_match(
    generator: TextGenerator, data: TextData, num_pairs: int, *, batch_size: int = 32, progress: bool = False
) -> ExactMatch:
    """Generates answers to held-out prompts, evenly spaced over them, and compares their texts with the references.

    Raises:
        ValueError: the data has no pairs, or a prompt is too long for the model.
    """
    part = data.held_out
    if part.conditions is None:
        raise ValueError("exact match: this run's data has no pairs")
    indices = evenly_spaced(len(part.targets), num_pairs).tolist()
    rows = [part.conditions.document(i).tolist() for i in indices]
    for index, row in zip(indices, rows, strict=True):
        generator.check(row, f"held-out prompt {index}")
    prompts, right = [generator.decode(row) for row in rows], 0
    with tqdm(total=len(rows), unit="answer", desc="exact match", disable=not progress) as bar:
        for batch in generator.generate(prompts, rows, batch_size=batch_size):
            references = (part.targets.document(indices[answer.row]).tolist() for answer in batch)
            right += sum(answer.text == generator.decode(ids) for answer, ids in zip(batch, references, strict=True))
            bar.update(len(batch))
    share, done = right / len(rows), generator.statistics
    error = math.sqrt(share * (1 - share) / max(len(rows) - 1, 1))
    return ExactMatch(share, error, len(rows), done.tokens_per_second, done.forward_passes)


def _held_out(loaded: LanguageModel, arguments: Any, config: Any, options: dict, results: dict[str, Any]) -> str:
    recipe, data = loaded.recipe, text_of_run(loaded)
    bound = likelihood_bound(
        loaded.model,
        **likelihood_arguments(recipe, loaded.model.config, data, arguments.likelihood_samples),
        batch_size=arguments.batch_size,
        progress=True,
    )
    results["likelihood"] = dataclasses.asdict(bound)
    match = None
    if data.held_out.conditions is not None and arguments.num_pairs:
        predictor = load_length_predictor(loaded, config)
        generator = TextGenerator(loaded.model, loaded.tokenizer, config, predictor)
        match = exact_match(generator, data, arguments.num_pairs, batch_size=arguments.batch_size, progress=True)
        results["exact_match"] = {**dataclasses.asdict(match), "generation": options}
    return markdown(bound, match)


def markdown(bound: LikelihoodBound, match: ExactMatch | None = None) -> str:
    """The held-out numbers as a table."""
    rows = [
        ("held-out", "value", "standard error"),
        ("---", "---:", "---:"),
        ("bound, nats a token", f"{bound.nats_per_token:.4f}", f"{bound.standard_error:.4f}"),
        ("perplexity (bound)", f"{bound.perplexity:.2f}", f"{bound.perplexity_standard_error:.2f}"),
    ]
    if match is not None:
        rows.append((f"exact match, {match.pairs} pairs", f"{match.accuracy:.1%}", f"{match.standard_error:.1%}"))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def run_folder(path: str) -> Path:
    """The folder of the run that a path names, or a checkpoint in it."""
    given = Path(path)
    return given.parent.parent if given.parent.name == "checkpoints" else given


def _check(arguments: Any, tasks: list[str], held_out: bool) -> None:
    for name, least in (("num_pairs", 0), ("batch_size", 1), ("draws", 1), ("likelihood_samples", 2)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; expected at least {least}")
    if arguments.lm_eval is not None and not tasks:
        raise ValueError("--lm-eval names no task; expected names with commas between them")
    if not tasks and not held_out:
        why = "--no-held-out" if not arguments.held_out else f"{arguments.run} is no run, and has no held-out text"
        raise ValueError(f"nothing to evaluate: {why}; pass --lm-eval TASKS")
