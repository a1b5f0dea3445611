"""Options of `fastdiff.evaluate` on a masked diffusion language model."""

import dataclasses
from typing import Any, Literal

from fastdiff.tasks.options import DataOptions, GenerationOptions, RunOptions, at_least


@dataclasses.dataclass
class EvaluateOptions(DataOptions, RunOptions):
    """Measures a language model: Monte-Carlo likelihood bound of the held-out text, exact match of generated answers
    where it has pairs, and lm-eval tasks; with --length, instead of these, how every rule bounds the lengths of
    held-out answers. Decoding options that are not given are those of the run's recipe (sampling.generation).

    Attributes:
        output: path of the JSON; default: evaluation.json in the folder of the run or saved model
        held_out: the held-out text of the run
        likelihood_samples: draws of the bound; default: the recipe's
        num_pairs: held-out prompts answered; 0 for none (default: 500; with --length 2000, half to calibrate)
        batch_size: rows computed at once (default: 32)
        lm_eval: tasks of lm-eval, with commas; any checkpoint, not only runs
        lm_eval_include_path: a folder with task files (YAML) of one's own
        draws: Monte-Carlo samples per lm-eval request (default: 128)
        limit: documents of each lm-eval task; default: all
        num_fewshot: examples before each lm-eval prompt; default: the task's
        length: alone (rules): measures every rule of length prediction on held-out pairs and saves their calibrations,
            and does nothing else; fixed or auto: how answers are generated; default: fixed
        coverage: coverage that --length calibrates for, or --length auto decodes with (default: 0.95)
        window: window of --length in tokens; default: the recipe's data.max_length
        length_heads: learned heads for --length: runs of `task: length_head`
        length_expansion_pairs: pairs that --length uses for the rules of many passes, daedal and rho; 0 for none
            (default: 400)
        seed: seed of generation, or of the split into halves and the bootstrap (default: 0)
    """

    output: str | None = None
    held_out: bool = True
    likelihood_samples: int | None = None
    num_pairs: int | None = None
    batch_size: int | None = None
    lm_eval: str | None = None
    lm_eval_include_path: str | None = None
    draws: int | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    length: Literal["rules", "fixed", "auto"] | None = dataclasses.field(
        default=None, metadata={"nargs": "?", "const": "rules", "metavar": "{rules,fixed,auto}"}
    )
    coverage: float | None = None
    window: int | None = None
    length_heads: list[str] | None = None
    length_expansion_pairs: int | None = None
    seed: int | None = None
    generation: GenerationOptions = dataclasses.field(default_factory=GenerationOptions)

    def __post_init__(self):
        for name, least in {"num_pairs": 0, "batch_size": 1, "draws": 1, "likelihood_samples": 2}.items():
            at_least(name, getattr(self, name), least)

    def decoding(self) -> dict[str, Any]:
        """The options of decoding that were given."""
        return {**self.generation, "length": self.length, "coverage": self.coverage, "seed": self.seed}
