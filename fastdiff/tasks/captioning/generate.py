"""`fastdiff.generate` on a captioning model."""

import secrets
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from fastdiff.generation import Continuation
from fastdiff.tasks.captioning.features import name_of
from fastdiff.tasks.captioning.run import CaptioningRun, load_run
from fastdiff.tasks.masked_lm.generate import keeping_finished, statistics_line, view_of
from fastdiff.tasks.options import GenerationOptions, RunOptions, at_least
from fastdiff.visualization.terminal import printable


@dataclass
class GenerateOptions(RunOptions):
    """Captions images with a masked diffusion language model. Decoding options that are not given are those of the
    run's recipe (sampling.generation); guidance_scale is that of guidance on the image.

    Attributes:
        image: a picture to caption; may be repeated
        num_samples: number of captions of each picture; they differ with --temperature above 0
        batch_size: captions decoded at once; it does not change them
        watch: show the captions as they take shape
        output: a .jsonl file to write the captions to, each batch as it is done
        dtype: float32, bfloat16 or float16; default: as stored
    """

    image: list[str] | None = field(default=None, metadata={"action": "append"})
    num_samples: int = 1
    batch_size: int = 16
    watch: bool = False
    output: str | None = None
    dtype: str | None = None
    generation: GenerationOptions = field(default_factory=GenerationOptions)

    def __post_init__(self):
        for name in ("num_samples", "batch_size"):
            at_least(name, getattr(self, name), 1)


def generate_captions(path: str, options: GenerateOptions) -> None:
    """Prints captions as they are done, and writes them to a file where one is named."""
    if not options.image:
        raise ValueError("--image: got none; expected a picture")
    with keeping_finished(options.output) as output:
        run = load_run(path, weights=options.weights, device=options.device, dtype=options.dtype)
        given = dict(options.generation)
        if given.get("seed", run.decoding.get("seed")) is None:
            given["seed"] = secrets.randbelow(2**31)
        captioner = run.captioner(given)
        states = run.states(options.image)
        names = [name_of(image, number) for number, image in enumerate(options.image, 1)]
        decoding = {**run.decoding, **given}
        view = view_of(captioner.generator) if options.watch else None
        begin = None if view is None else lambda ids, mask: view.begin(mask)
        sizes = dict(num_samples=options.num_samples, batch_size=options.batch_size, streamer=begin)
        with view or nullcontext():
            for batch in captioner(names, states, **sizes):
                if view is not None:
                    view.finish()
                if output is not None:  # before they are printed, which a pipe may end
                    output.add([_record(sample, decoding, run) for sample in batch])
                for sample in batch:
                    before = f"{sample.prompt}: " if len(names) > 1 else ""
                    print(printable(before + (sample.text or "(no text: it begins with an end token)")), flush=True)
        print(statistics_line(captioner.generator) + ("" if output is None else f"; written to {options.output}"))


def _record(sample: Continuation, decoding: dict[str, Any], run: CaptioningRun) -> dict[str, Any]:
    return {"image": sample.prompt, "text": sample.text, "tokens": sample.tokens, "sample": sample.copy,
            "seed": decoding["seed"], "options": decoding, "step": run.step}  # fmt: skip
