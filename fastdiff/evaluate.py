"""Evaluates a run, by its kind: `python -m fastdiff.evaluate runs/x`.

Of a diffusion transformer: scores of samples beside real held-out images. Of a QGFD model: for each modality class
accuracy (images), a classifier trained on synthetic rows (tables) or a Fréchet distance. Of a language model:
likelihood of held-out text, exact match of generated answers, tasks of lm-eval; with `--length`, in place of these,
how well each rule bounds the lengths of held-out answers.
"""

from collections.abc import Sequence
from typing import Any

from jsonargparse import SUPPRESS, ActionYesNo, ArgumentParser

from fastdiff.cli import command, quiet_libraries, run_parser

_SHARED = {"run", "guidance_scale", "num_inference_steps", "seed", "weights", "device", "output"}
_SAMPLES = {"num_samples", "sampler"}  # options of runs whose samples are drawn by a sampler
_ONLY_RULES = {"window", "length_heads", "length_expansion_pairs"}


def make_parser() -> ArgumentParser:
    """The command's arguments. Those of one kind of run alone have no default, so that others can be told apart."""
    from fastdiff.generation.config import LENGTHS
    from fastdiff.generation.options import add_generation_options

    parser = run_parser(
        "evaluate",
        "Evaluates a run by its kind. Images: class accuracy and Fréchet distance of samples under a small classifier "
        "that is trained once on the real images and cached, and distance to the nearest training image; beside them "
        "the same numbers of real held-out images. QGFD models: for each modality the same (images), a classifier "
        "trained on synthetic rows and tested on real ones (tables), or a Fréchet distance in the encoder's space "
        "beside that of held-out examples. Language models: Monte-Carlo likelihood bound of the held-out text, exact "
        "match of generated answers where it has pairs, and lm-eval tasks; with --length, in place of these, how every "
        "rule bounds the lengths of held-out answers.",
    )
    add = parser.add_argument
    add("--output", type=str | None, help="of the JSON; default: evaluation.json in the run's folder")
    add("--num-samples", type=int | None, help="images, QGFD: samples, spread evenly over classes (default: 500)")
    add("--modality", type=str | None, help="QGFD: the one to measure, of a run with several; default: each of them")
    language = {
        "--held-out": dict(action=ActionYesNo(no_prefix="no-"), help="the held-out text of the run (default: True)"),
        "--likelihood-samples": dict(type=int, help="draws of the bound (default: the recipe's)"),
        "--num-pairs": dict(
            type=int, help="held-out prompts answered; 0 for none (default: 500; with --length 2000, half to calibrate)"
        ),
        "--batch-size": dict(type=int, help="rows computed at once (default: 32)"),
        "--lm-eval": dict(type=str, help="tasks of lm-eval, with commas; any checkpoint, not only runs"),
        "--lm-eval-include-path": dict(type=str, help="a folder with task files (YAML) of one's own"),
        "--draws": dict(type=int, help="of the bound, for each request of lm-eval (default: 128)"),
        "--limit": dict(type=int, help="documents of each lm-eval task (default: all)"),
        "--length": dict(
            nargs="?",
            const="rules",
            choices=("rules", *LENGTHS),
            metavar="{rules,fixed,auto}",
            help="alone (rules): measures every rule of length prediction on held-out pairs and saves their "
            "calibrations, and does nothing else; fixed or auto: how answers are generated (default: fixed)",
        ),
        "--coverage": dict(
            type=float, help="that --length calibrates for, or --length auto decodes with (default: 0.95)"
        ),
        "--window": dict(type=int, help="of --length, in tokens (default: the recipe's data.max_length)"),
        "--length-heads": dict(type=str, nargs="+", help="of --length: runs of recipes/eos_head_*.yaml"),
        "--length-expansion-pairs": dict(
            type=int, help="of --length: pairs for the rules of many passes, daedal and rho; 0 for none (default: 400)"
        ),
        "--num-fewshot": dict(type=int, help="examples before each lm-eval prompt (default: the task's)"),
    }
    for option, settings in language.items():
        add(option, default=SUPPRESS, **{**settings, "help": f"text: {settings['help']}"})
    add_generation_options(parser)
    return parser


def _check_options(arguments: Any, kind: str) -> None:
    """Raises ValueError for an option of another kind of run."""
    what = {"dit": "generates images", "masked_lm": "generates text", "qgfd": "is of a QGFD model"}[kind]
    for name, value in vars(arguments).items():
        if value is None or name in _SHARED:
            continue
        if name == "modality":
            fits, other = kind == "qgfd", "QGFD models"
        elif name in _SAMPLES:
            fits, other = kind != "masked_lm", "images"
        else:
            fits, other = kind == "masked_lm", "text" if kind == "dit" else "language models"
        if not fits:
            raise ValueError(f"--{name.replace('_', '-')} is for {other}; {arguments.run} {what}")


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    from fastdiff.training.runs import run_kind

    arguments = make_parser().parse_args(argv)
    quiet_libraries()
    kind_of_run = run_kind(arguments.run)
    _check_options(arguments, kind_of_run)
    if kind_of_run == "qgfd":
        from fastdiff.evaluation.qgfd_command import evaluate_qgfd

        return evaluate_qgfd(arguments)
    if kind_of_run == "dit":
        from fastdiff.evaluation.image_command import evaluate_images

        return evaluate_images(arguments)
    if getattr(arguments, "length", None) == "rules":
        from fastdiff.evaluation.length_command import evaluate_lengths

        return evaluate_lengths(arguments)
    for name in _ONLY_RULES & set(vars(arguments)):
        raise ValueError(f"--{name.replace('_', '-')} is for --length; pass that too, or leave it out")
    from fastdiff.evaluation.language_command import DEFAULT_DRAWS, DEFAULT_PAIRS, evaluate_language_model

    defaults = dict(held_out=True, likelihood_samples=None, num_pairs=DEFAULT_PAIRS, batch_size=32, lm_eval=None,
                    lm_eval_include_path=None, draws=DEFAULT_DRAWS, limit=None, num_fewshot=None)  # fmt: skip
    for name, value in defaults.items():
        if name not in arguments:
            arguments[name] = value
    evaluate_language_model(arguments)


if __name__ == "__main__":
    main()
