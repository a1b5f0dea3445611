"""How a masked diffusion language model decodes: lengths, steps, blocks, sampling, and the rule of unmasking."""

import math
from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig

from fastdiff.ops.unmask import ORDERS, RULES

_FIELDS: dict[str, Any] = dict(
    max_new_tokens=128, num_inference_steps=None, block_length=None, temperature=0.0, top_k=None, top_p=None,
    guidance_scale=1.0, unmasking_rule="count", unmasking_order="confidence", threshold=None, factor=None,
    entropy_budget=None, seed=None, prefix_cache=False, dual_cache=False, cache_refresh_interval=None,
    early_stop=False, stop_strings=None, suppress_tokens=None, length="fixed", coverage=0.95, reuse_probe=False,
)  # fmt: skip
_RULE_NUMBERS = {"threshold": 0.9, "factor": 1.0, "entropy_budget": 0.15}  # what None means: the papers' values
LENGTHS = ("fixed", "auto")
_OTHERS = (  # what transformers itself passes or stores
    "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config", "_commit_hash",
)  # fmt: skip


class MaskedDiffusionGenerationConfig(GenerationConfig):
    """Options of `fastdiff.generation.generate`. Fields of other ways to decode (num_beams, …) are refused.

    Attributes:
        max_new_tokens: Tokens after the prompt; 0 only fills the prompt's own mask tokens.
        block_length: Blocks are decoded from left to right, the next one when one is full; it divides max_new_tokens.
            None: one block.
        num_inference_steps: Steps over all blocks, a multiple of their number, for the rules "count" and "ancestral"
            (the others take as many as they need). None: one per token. The prompt's own mask tokens get as many
            steps as a block, or all steps where max_new_tokens is 0.
        temperature: 0 takes the likeliest token.
        top_k, top_p: Draw among the k likeliest, or the likeliest that have this probability together. None: off.
        guidance_scale: Classifier-free guidance, logits = u + scale · (c − u), u being the logits with the prompt
            masked. 1: none. LLaDA's cfg_scale + 1.
        unmasking_rule: "count" (LLaDA: a block's masks spread evenly over its steps), "threshold", "factor"
            (Fast-dLLM), "entropy_budget" or "ancestral" (MDLM, on an even grid of mask rates); see
            `fastdiff.ops.unmask_`. All but "count" commit tokens in parallel where the model is sure: approximate.
        unmasking_order: "confidence", "margin", "entropy" or "random".
        threshold, factor, entropy_budget: The number of that rule; None: 0.9, 1.0 and 0.15.
        seed: Seed of all random draws; None draws one from torch's generator.
        prefix_cache: Approximate, off by default (Fast-dLLM): a step within a block computes the tokens from the block
            to the row's end; keys and values of those before it are as they were when the row began the block.
        dual_cache: The same for the tokens after the block: a step computes the block alone. One of the two.
        cache_refresh_interval: Steps of a block from one computation of the whole row to the next (1: every step, so
            that nothing is approximate). None: only where a row begins a block.
        early_stop: Approximate, off by default: a row ends when a block is full and holds an end token
            (eos_token_id, or the model's); what is left of the row becomes that token.
        stop_strings: Approximate, None by default: a row ends when a block is full and the new text up to there holds
            one of these strings; the tokens after the one that completes it become the end token (pad where there is
            none). `generate` needs tokenizer= then.
        suppress_tokens: Ids that are never chosen, beside the mask token.
        length: "fixed", a row has max_new_tokens to fill; or "auto": one pass predicts how long its answer will be
            (`fastdiff.generation.length`), and it gets as many, rounded up to a block (of 8 where block_length is
            None). A row ends where everything before its first end token is chosen; one that fills up without an end
            token grows by a block and goes on, up to max_new_tokens. num_inference_steps are those of max_new_tokens, a
            smaller row takes its share.
        coverage: For length="auto", the share of answers that are to fit at once; it holds for a calibrated predictor.
        reuse_probe: Approximate, off by default: the pass that predicted the lengths is the first step, too, although
            it saw longer rows.

    Raises ValueError, naming the field, for values that do not fit.
    """

    def __init__(self, **kwargs: Any) -> None:
        for name, value in kwargs.items():
            if name not in _FIELDS and name not in _OTHERS and value is not None:
                known = ", ".join(_FIELDS)
                raise ValueError(f"{name}: masked diffusion decoding has no such option; expected some of {known}")
        if isinstance(kwargs.get("stop_strings"), str):
            kwargs["stop_strings"] = [kwargs["stop_strings"]]
        super().__init__(**{**_FIELDS, **kwargs})

    @staticmethod
    def option_defaults() -> dict[str, Any]:
        """The fields above and their defaults."""
        return dict(_FIELDS)

    @property
    def num_blocks(self) -> int:
        """Blocks of new tokens."""
        return self.max_new_tokens // self.block_length if self.block_length else min(self.max_new_tokens, 1)

    @property
    def steps_per_block(self) -> int | None:
        """Steps of a block under "count" and "ancestral"; None: one per token."""
        if self.num_inference_steps is None:
            return None
        return self.num_inference_steps // max(self.num_blocks, 1)

    @property
    def growth(self) -> int:
        """What lengths are rounded up to, and rows grow by, under length="auto"."""
        return self.block_length or 8

    @property
    def rule_number(self) -> float | None:
        """The number of the rules that have a fixed one."""
        default = _RULE_NUMBERS.get(self.unmasking_rule)
        given = getattr(self, self.unmasking_rule, None)
        return default if given is None else given

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None) -> None:
        """Raises ValueError where values do not fit; transformers calls it too (its arguments are not used)."""
        _integer("max_new_tokens", self.max_new_tokens, 0)
        for name in ("num_inference_steps", "block_length"):
            _integer(name, getattr(self, name), 1, optional=True)
        _integer("top_k", self.top_k, 0, optional=True)
        _integer("seed", self.seed, -(2**63), optional=True)
        _number("temperature", self.temperature, lambda x: x >= 0, "a number of 0 or above")
        _number("guidance_scale", self.guidance_scale, lambda x: True, "a finite number (1 is none)")
        if self.top_p is not None:
            _number("top_p", self.top_p, lambda x: 0 < x <= 1, "a number in (0, 1], or None")
        for name, known in (("unmasking_rule", RULES), ("unmasking_order", ORDERS), ("length", LENGTHS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: got {getattr(self, name)!r}; expected one of {', '.join(known)}")
        for name in ("early_stop", "prefix_cache", "dual_cache", "reuse_probe"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: got {getattr(self, name)!r}; expected True or False")
        self._validate_caches()
        self._validate_length()
        strings = self.stop_strings
        if strings is not None and not (
            isinstance(strings, list | tuple) and strings and all(isinstance(s, str) and s for s in strings)
        ):
            raise ValueError(f"stop_strings: got {strings!r}; expected a list of strings that are not empty, or None")
        for token in self.suppress_tokens or ():
            _integer("suppress_tokens", token, 0)
        self._validate_rule()
        self._validate_steps()

    def _validate_caches(self) -> None:
        _integer("cache_refresh_interval", self.cache_refresh_interval, 1, optional=True)
        if self.prefix_cache and self.dual_cache:
            raise ValueError("prefix_cache: got dual_cache too, which caches the prefix as well; drop prefix_cache")
        if self.cache_refresh_interval is not None and not (self.prefix_cache or self.dual_cache):
            raise ValueError(
                f"cache_refresh_interval: got {self.cache_refresh_interval} without a cache; set prefix_cache or "
                "dual_cache, or leave it out"
            )

    def _validate_length(self) -> None:
        _number("coverage", self.coverage, lambda x: 0 < x < 1, "a number in (0, 1)")
        if self.length == "auto" and not self.max_new_tokens:
            raise ValueError("length: got 'auto' with max_new_tokens = 0: no answer to predict the length of")
        if not self.reuse_probe:
            return
        others = {
            'length="fixed"': self.length == "fixed",
            "a cache": self.prefix_cache or self.dual_cache,
            "guidance": self.guidance_scale != 1,
        }
        for other, there in others.items():
            if there:
                raise ValueError(f"reuse_probe: got True with {other}; its pass cannot be a step then: leave it out")

    def _validate_rule(self) -> None:
        ranges = {
            "threshold": (lambda x: 0 < x <= 1, "a number in (0, 1]"),
            "factor": (lambda x: x > 0, "a number above 0"),
            "entropy_budget": (lambda x: x >= 0, "a number of 0 or above, in nats"),
        }
        for name, (fits, expected) in ranges.items():
            value = getattr(self, name)
            if value is None:
                continue
            _number(name, value, fits, expected)
            if self.unmasking_rule != name:
                raise ValueError(
                    f"{name}: got {value} with unmasking_rule={self.unmasking_rule!r}; set unmasking_rule={name!r} "
                    f"or leave {name} out"
                )
        if self.unmasking_rule in ranges and self.num_inference_steps is not None:
            raise ValueError(
                f"num_inference_steps: got {self.num_inference_steps} with unmasking_rule={self.unmasking_rule!r}, "
                "which takes as many steps as it needs; leave it out"
            )

    def _validate_steps(self) -> None:
        length, block, steps = self.max_new_tokens, self.block_length, self.num_inference_steps
        if block is not None and (not length or length % block):
            fitting = f"a divisor of max_new_tokens = {length}: {_listed(_divisors(length))}"
            raise ValueError(
                f"block_length: got {block}; expected {fitting if length else 'None (max_new_tokens is 0)'}"
            )
        blocks = max(self.num_blocks, 1)
        if steps is not None and steps % blocks:
            below = steps // blocks * blocks
            fitting = " or ".join(str(n) for n in (below, below + blocks) if n)
            raise ValueError(
                f"num_inference_steps: got {steps} for {blocks} blocks; expected a multiple of {blocks}: {fitting}"
            )
        if self.unmasking_rule == "ancestral" and steps is None and not length:
            raise ValueError("num_inference_steps: got None; the rule ancestral needs it where max_new_tokens is 0")


def merged_options(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`defaults` (a recipe's `sampling.generation`), replaced by what was given.

    The number of a rule that the command line leaves is dropped with it: `--unmasking-rule count` on a recipe with a
    threshold.
    """
    given = {name: value for name, value in given.items() if value is not None}
    options = {**defaults, **given}
    if given.get("max_new_tokens") == 0:  # fills the prompt's masks: a recipe's blocks of new tokens mean nothing then
        for name in {"block_length", "num_inference_steps", "length"} - given.keys():
            options.pop(name, None)
    rule = given.get("unmasking_rule")
    if rule is not None:
        numbers = {"threshold", "factor", "entropy_budget"} - {rule}
        if rule not in ("count", "ancestral"):
            numbers.add("num_inference_steps")
        for name in numbers & defaults.keys() - given.keys():
            options.pop(name, None)
    return options


def _integer(name: str, value: Any, least: int, optional: bool = False) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least or value >= 2**63:
        expected = "an int" if least < 0 else f"an int of {least} or more"
        raise ValueError(f"{name}: got {value!r}; expected {expected}{' or None' if optional else ''}")


def _number(name: str, value: Any, fits: Any, expected: str) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not fits(value):
        raise ValueError(f"{name}: got {value!r}; expected {expected}")


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
