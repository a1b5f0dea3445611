"""`fastdiff.generate` on a masked diffusion language model."""

import secrets
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdiff.data.text_config import LengthFormat
from fastdiff.files import RecordFile, output_path
from fastdiff.generation import Continuation, MaskedDiffusionGenerationConfig, TextGenerator
from fastdiff.generation.config import merged_options
from fastdiff.tasks.masked_lm.run import (
    DEFAULT_NEW_TOKENS,
    decoding_defaults,
    language_model_recipe,
    load_language_model,
    load_length_predictor,
)
from fastdiff.tasks.options import GenerationOptions, RunOptions, at_least
from fastdiff.tasks.prompts import read_prompt_file
from fastdiff.visualization.terminal import printable

_WATCHED = 3  # sequences shown by --watch


@dataclass
class GenerateOptions(RunOptions):
    """Continues prompts with a masked diffusion language model, and fills mask tokens in them. Decoding options that
    are not given are those of the run's recipe (sampling.generation), or the defaults named below.

    Attributes:
        prompt: text to continue; may be repeated; the tokenizer's mask token in it (<mask> where it has none) is filled
        prompt_file: prompts, one on each line; or .jsonl, one object on each line with the field "prompt"; blank lines
            are left out
        unconditional: an empty prompt begins a text; without --prompt, one such
        chat: each prompt is a user's message, put into the tokenizer's chat template
        num_samples: number of samples for each prompt
        batch_size: samples decoded at once; it does not change them
        length_format: needed for --length auto with a checkpoint whose config does not say how answers ended in
            training
        watch: show the text as it takes shape
        output: a .jsonl file to write the samples to, each batch as it is done
        dtype: float32, bfloat16 or float16; default: as stored
    """

    prompt: list[str] | None = field(default=None, metadata={"action": "append"})
    prompt_file: str | None = None
    unconditional: bool = False
    chat: bool = False
    num_samples: int = 1
    batch_size: int = 16
    length_format: LengthFormat | None = None
    watch: bool = False
    output: str | None = None
    dtype: str | None = None
    generation: GenerationOptions = field(
        default_factory=GenerationOptions, metadata={"defaults": {"max_new_tokens": DEFAULT_NEW_TOKENS}}
    )

    def __post_init__(self):
        for name in ("num_samples", "batch_size"):
            at_least(name, getattr(self, name), 1)


def generate_text(path: str, options: GenerateOptions) -> None:
    """Prints samples as they are done, and writes them to a file where one is named."""
    with keeping_finished(options.output) as output:
        _generate(path, options, output)


@contextmanager
def keeping_finished(named: str | None) -> Iterator[RecordFile | None]:
    """A block that writes samples to a file, as it was named; None where none is.

    Where it is interrupted, or who reads the text has gone, as `head` does, a line on stderr says what is in the file.
    """
    path = None if named is None else output_path(named, Path(named))
    output = None if path is None else RecordFile(path)
    try:
        yield output
    except (KeyboardInterrupt, BrokenPipeError) as error:
        stopped = "interrupted" if isinstance(error, KeyboardInterrupt) else "the output was closed"
        if output is not None and output.count:
            print(f"{stopped}; {output.count} finished samples are in {named}", file=sys.stderr)
        elif isinstance(error, KeyboardInterrupt):
            print(stopped, file=sys.stderr)
        if isinstance(error, BrokenPipeError):
            raise
        raise SystemExit(130) from None


def _generate(path: str, options: GenerateOptions, output: RecordFile | None) -> None:
    prompts = read_prompts(options.prompt, options.prompt_file, options.unconditional)
    recipe = language_model_recipe(path)
    defaults = decoding_defaults(path, recipe)
    decoding = merged_options(options.generation, {"max_new_tokens": DEFAULT_NEW_TOKENS, **defaults})
    if decoding.get("seed") is None:
        decoding["seed"] = secrets.randbelow(2**31)
    if options.length_format is not None and decoding.get("length") != "auto":
        raise ValueError(f"--length-format: got {options.length_format} without --length auto; pass that, too")
    config = checked_config(decoding, {name: value for name, value in defaults.items() if decoding.get(name) == value})
    loaded = load_language_model(path, weights=options.weights, device=options.device, dtype=options.dtype)
    predictor = load_length_predictor(loaded, config, options.length_format)
    if predictor is not None and not predictor.calibrated:
        print(
            f"length: {loaded.source} has no calibration, so coverage {config.coverage} is the model's own word; "
            "python -m fastdiff.evaluate RUN --length makes one",
            file=sys.stderr,
        )
    generator = TextGenerator(loaded.model, loaded.tokenizer, config, predictor)
    with_recipe = recipe is not None and recipe.data.sample == "pairs"
    _print_samples(generator, prompts, options, decoding, output, apart=with_recipe)
    print(statistics_line(generator) + ("" if output is None else f"; written to {options.output}"))


def _print_samples(
    generator: TextGenerator,
    prompts: list[str],
    options: GenerateOptions,
    decoding: dict[str, Any],
    output: RecordFile | None,
    apart: bool,
) -> None:
    """Writes and prints each batch when it is done. `apart`: prompts are not part of the text."""
    rows = generator.encode(prompts, chat=options.chat, unconditional=options.unconditional)
    # a prompt that is not part of the text stands on a line of its own
    apart = options.chat or generator.has_encoder or apart
    several = len(prompts) * options.num_samples > 1
    view = view_of(generator) if options.watch else None
    sizes = dict(num_samples=options.num_samples, batch_size=options.batch_size)
    with view or nullcontext():
        begin = None if view is None else lambda ids, mask: view.begin(mask)
        for batch in generator.generate(prompts, rows, **sizes, streamer=begin):
            if view is not None:
                view.finish()
            if output is not None:  # before they are printed, which a pipe may end
                output.add([_record(sample, decoding) for sample in batch])
            for sample in batch:
                if several:
                    print(f"--- prompt {sample.row + 1}, sample {sample.copy + 1}")
                before = sample.prompt if sample.filled is None else sample.filled
                print(printable(before + ("\n" if apart else "") + sample.text), flush=True)
                if not sample.text and generator.config.max_new_tokens:
                    print("(no text: it begins with an end token)", file=sys.stderr)


def _record(sample: Continuation, decoding: dict[str, Any]) -> dict[str, Any]:
    filled = {} if sample.filled is None else {"filled": sample.filled}
    return {"prompt": sample.prompt, **filled, "text": sample.text, "tokens": sample.tokens,
            "sample": sample.copy, "seed": decoding["seed"], "options": decoding}  # fmt: skip


def statistics_line(generator: TextGenerator) -> str:
    """What was generated, how fast."""
    done = generator.statistics
    saved = ""
    if done.window_tokens:
        share, grew = done.saved_tokens / done.window_tokens, done.extended_rows
        saved = f"; {done.saved_tokens} of {done.window_tokens} window tokens saved ({share:.0%}), "
        saved += f"{grew} sample{'' if grew == 1 else 's'} grew"
    return (
        f"{done.tokens} tokens in {done.seconds:.1f} s ({done.tokens_per_second:.0f} tokens/s), "
        f"{done.forward_passes} forward passes{saved}"
    )


def checked_config(options: dict[str, Any], of_the_recipe: dict[str, Any]) -> Any:
    """The options checked; an error about a value that the run's recipe has says so."""
    try:
        return MaskedDiffusionGenerationConfig(**options)
    except ValueError as error:
        named = [name for name in of_the_recipe if str(error).startswith(f"{name}:")]
        if not named:
            raise
        option = named[0].replace("_", "-")
        raise ValueError(f"{error} ({named[0]} is the run's recipe's; pass --{option} for another)") from None


def read_prompts(given: Sequence[str] | None, file: str | None, unconditional: bool = False) -> list[str]:
    """The prompts of --prompt and --prompt-file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no prompt at all, or a file that is not UTF-8 or not JSON; the message names file and line or byte.
    """
    prompts = [*(given or []), *(read_prompt_file(file) if file is not None else [])]
    if not prompts and unconditional and file is None:
        prompts = [""]
    if not prompts:
        raise ValueError("prompt: got none; expected --prompt TEXT, --prompt-file FILE or --unconditional")
    return prompts


def view_of(generator: Any) -> Any:
    """What shows a generator's texts as they take shape."""
    from fastdiff.visualization.watch import DenoisingView

    return DenoisingView(generator.tokenizer, generator.mask_token_id, rows=_WATCHED, keep=False)
