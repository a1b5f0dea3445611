"""Generates text: `python -m fastdiff.generate runs/x --prompt "To be" --max-new-tokens 64 --seed 1 --watch`."""

import json
import secrets
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from fastdiff.cli import ArgumentParser, command, output_path, program, quiet_libraries

DEFAULT_NEW_TOKENS = 64
_WATCHED = 3  # sequences shown by --watch


def make_parser() -> ArgumentParser:
    """The command's arguments; decoding options that are None are what the run's recipe says."""
    from fastdiff.generation.options import add_generation_options
    from fastdiff.models.masked_lm_config import LENGTH_FORMATS

    parser = ArgumentParser(
        prog=program("generate"),
        description="Continues prompts with a masked diffusion language model, and fills mask tokens in them. "
        "Decoding options that are not given are those of the run's recipe (sampling.generation), or the defaults "
        "named below.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", type=str, help="a run's folder (the newest checkpoint), a checkpoint, or a model's folder or hub id")
    add(
        "--prompt",
        type=str,
        action="append",
        help="text to continue; may be repeated; the tokenizer's mask token in it (<mask> where it has none) is filled",
    )
    add("--prompt-file", type=str, help='prompts, one a line; or .jsonl, one object a line with the field "prompt"')
    add("--unconditional", action="store_true", help="an empty prompt begins a text (BoS); without --prompt, one such")
    add("--chat", action="store_true", help="each prompt is a user's message, put into the tokenizer's chat template")
    add("--num-samples", type=int, default=1, help="samples of each prompt")
    add("--batch-size", type=int, default=16, help="samples decoded at once; it does not change them")
    add(
        "--length-format",
        choices=LENGTH_FORMATS,
        help="of --length auto, for a checkpoint whose config does not say how answers ended in training",
    )
    add("--watch", action="store_true", help="show the text as it takes shape")
    add("--output", type=str, help="a .jsonl file to write the samples to")
    add("--weights", choices=("ema", "model"), default="ema", help="of a run: averaged or plain weights")
    add("--device", type=str, help="for example cpu or cuda")
    add("--dtype", type=str, help="float32, bfloat16 or float16; default: as stored")
    add_generation_options(parser, {"max_new_tokens": DEFAULT_NEW_TOKENS})
    return parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    arguments = make_parser().parse_args(argv)
    quiet_libraries()
    records: list[dict[str, Any]] = []
    output = None if arguments.output is None else output_path(arguments.output, Path(arguments.output))
    try:
        _run(arguments, output, records)
    except KeyboardInterrupt:
        if output is not None and records:
            _save(output, records)
            print(f"interrupted; {len(records)} finished samples are in {output}", file=sys.stderr)
        else:
            print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _run(arguments: Any, output: Path | None, records: list[dict[str, Any]]) -> None:
    from fastdiff.generation.options import generation_options
    from fastdiff.generation.text import TextGenerator
    from fastdiff.training.runs import language_model_recipe, load_language_model, load_length_predictor

    for name in ("num_samples", "batch_size"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; expected at least 1")
    prompts = read_prompts(arguments.prompt, arguments.prompt_file, arguments.unconditional)
    recipe = language_model_recipe(arguments.model)
    defaults = {} if recipe is None else recipe.sampling.generation
    options = generation_options(arguments, {"max_new_tokens": DEFAULT_NEW_TOKENS, **defaults})
    if options.get("seed") is None:
        options["seed"] = secrets.randbelow(2**31)
    if arguments.length_format is not None and options.get("length") != "auto":
        raise ValueError(f"--length-format is {arguments.length_format}, which is of --length auto; pass that, too")
    config = _config(options, {name: value for name, value in defaults.items() if options.get(name) == value})
    loaded = load_language_model(
        arguments.model, weights=arguments.weights, device=arguments.device, dtype=arguments.dtype
    )
    predictor = load_length_predictor(loaded, config, arguments.length_format)
    if predictor is not None and not predictor.calibrated:
        print(
            f"length: {loaded.source} has no calibration, so coverage {config.coverage} is the model's own word; "
            "python -m fastdiff.evaluate RUN --length makes one",
            file=sys.stderr,
        )
    generator = TextGenerator(loaded.model, loaded.tokenizer, config, predictor)
    rows = generator.encode(prompts, chat=arguments.chat, unconditional=arguments.unconditional)
    # a prompt that is no part of the text stands on a line of its own
    apart = arguments.chat or generator.has_encoder or (recipe is not None and recipe.data.sample == "pairs")
    several = len(prompts) * arguments.num_samples > 1
    view = _view(generator) if arguments.watch else None
    sizes = dict(num_samples=arguments.num_samples, batch_size=arguments.batch_size)
    with view or nullcontext():
        begin = None if view is None else lambda ids, mask: view.begin(mask)
        for batch in generator.generate(prompts, rows, **sizes, streamer=begin):
            if view is not None:
                view.finish()
            for sample in batch:
                if several:
                    print(f"--- prompt {sample.row + 1}, sample {sample.copy + 1}")
                before = sample.prompt if sample.filled is None else sample.filled
                print(_printable(before + ("\n" if apart else "") + sample.text), flush=True)
                if not sample.text:
                    print("(no text: it begins with an end token)", file=sys.stderr)
                filled = {} if sample.filled is None else {"filled": sample.filled}
                records.append({"prompt": sample.prompt, **filled, "text": sample.text, "tokens": sample.tokens,
                                "sample": sample.copy, "seed": options["seed"], "options": options})  # fmt: skip
    if output is not None:
        _save(output, records)
    done = generator.statistics
    saved = ""
    if done.window_tokens:
        share, grew = done.saved_tokens / done.window_tokens, done.extended_rows
        saved = f"; {done.saved_tokens} of {done.window_tokens} window tokens saved ({share:.0%}), "
        saved += f"{grew} sample{'' if grew == 1 else 's'} grew"
    print(
        f"{done.tokens} tokens in {done.seconds:.1f} s ({done.tokens_per_second:.0f} tokens/s), "
        f"{done.forward_passes} forward passes{saved}" + ("" if output is None else f"; written to {output}")
    )


def _config(options: dict[str, Any], of_the_recipe: dict[str, Any]) -> Any:
    """The options checked; an error about a value that the run's recipe has says so."""
    from fastdiff.generation.config import MaskedDiffusionGenerationConfig

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
    prompts = list(given or [])
    if file is not None:
        path = Path(file)
        if not path.is_file():
            raise FileNotFoundError(f"--prompt-file {file!r} is not a file; expected prompts, one a line, or JSONL")
        try:
            text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not UTF-8 at byte {error.start}; expected a text in UTF-8") from None
        lines = text.removesuffix("\n").split("\n") if text else []
        prompts += _json_prompts(file, lines) if path.suffix == ".jsonl" else lines
    if not prompts and unconditional and file is None:
        prompts = [""]
    if not prompts:
        raise ValueError("no prompt given; expected --prompt TEXT, --prompt-file FILE or --unconditional")
    return prompts


def _json_prompts(file: str, lines: Sequence[str]) -> list[str]:
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: not JSON ({error})") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise ValueError(f'{file}, line {number}: expected an object with the text field "prompt"')
        prompts.append(entry["prompt"])
    return prompts


def _view(generator: Any) -> Any:
    from fastdiff.visualization.watch import DenoisingView

    return DenoisingView(generator.tokenizer, generator.mask_token_id, rows=_WATCHED, keep=False)


def _printable(text: str) -> str:
    """The text without control characters, which a model may generate and a terminal would obey."""
    return "".join(
        c if c in "\n\t" or c.isprintable() or not c.isascii() else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def _save(output: Path, records: Sequence[dict[str, Any]]) -> None:
    from fastdiff.data.disk import write_output

    write_output(output, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


if __name__ == "__main__":
    main()
