"""How a masked diffusion language model decodes: lengths, steps, blocks, sampling, and the rule of unmasking."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers import GenerationConfig

from fastdiff.generation.schedule import DREAM_EPS, SCHEDULES
from fastdiff.ops.unmask import ORDERS, RULES

_FIELDS: dict[str, Any] = dict(
    max_new_tokens=128, num_inference_steps=None, block_length=None, temperature=0.0, top_k=None, top_p=None,
    guidance_scale=1.0, cfg_keep_tokens=None, unmasking_rule="count", unmasking_order="confidence",
    unmasking_schedule="even", eps=None, score_distribution="model", alg_temp=None, threshold=None, factor=None,
    entropy_budget=None, seed=None, prefix_cache=False, dual_cache=False, cache_refresh_interval=None,
    early_stop=False, stop_strings=None, suppress_tokens=None, begin_suppress_tokens=None, length="fixed",
    coverage=0.95, reuse_probe=False,
)  # fmt: skip
_RULE_NUMBERS = {"threshold": 0.9, "factor": 1.0, "entropy_budget": 0.15}  # what None means: the papers' values
CHOICES = {
    "unmasking_rule": RULES, "unmasking_order": ORDERS, "unmasking_schedule": SCHEDULES,
    "score_distribution": ("model", "sampling"), "length": ("fixed", "auto"),
}  # fmt: skip
_OTHERS = (  # what transformers itself passes or stores
    "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config", "_commit_hash",
)  # fmt: skip


class MaskedDiffusionGenerationConfig(GenerationConfig):
    """Options of `fastdiff.generation.generate`. Fields of other ways to decode (num_beams, …) are refused.

    Attributes:
        max_new_tokens: Tokens after the prompt; 0 only fills the prompt's own mask tokens.
        block_length: Blocks are decoded from left to right, the next one when one is full. The last block is shorter
            where they do not divide max_new_tokens, and a block is never longer than that. None: one block.
        num_inference_steps: Steps over all blocks for the rules "count" and "ancestral" (the others take as many as
            they need). Each block, a shorter last one too, gets this divided by their number, rounded up (as in dllm;
            LLaDA refuses what does not divide). None: one per token. The prompt's own mask tokens get as many steps as
            a block, or all steps where max_new_tokens is 0.
        temperature: 0 takes the likeliest token.
        top_k, top_p: Draw among the k likeliest, or the likeliest that have this probability together. None: off.
        guidance_scale: Classifier-free guidance, logits = u + scale · (c − u), u being the logits with the prompt
            masked. 1: none. LLaDA's cfg_scale + 1.
        cfg_keep_tokens: Ids of the prompt that are not masked for u (dllm's option of this name).
        unmasking_rule: "count" (LLaDA: as many a step as unmasking_schedule says), "threshold", "factor" (Fast-dLLM),
            "entropy_budget", see `fastdiff.ops.unmask_`; or "ancestral" (MDLM; Dream's alg="origin"): each masked
            position commits by itself, with the probability by which the mask rate falls in a step. Which step that
            is is drawn when a row begins, so that steps which commit nothing need no pass; MDLM's last pass, which
            takes the likeliest tokens for what is left, is its last step here, and draws. All but "count" commit
            tokens in parallel: approximate.
        unmasking_order: "confidence", "margin", "entropy" or "random". Of no effect under "ancestral".
        unmasking_schedule: How the masks of a block spread over its steps under "count" and "ancestral": "even"
            (LLaDA: the first `masks % steps` steps get one more), "dream" (floor(n · (1 - s/t)) of n masks, in each row
            of a batch by itself; Dream takes the mean of the rows), or round(n · (1 - r(s)/r(t))) of the mask rate r
            "linear", "cosine" or "maskgit_cosine" (dllm's schedulers; the names are MaskedDiffusionConfig's). Under
            "ancestral" the first two are "linear".
        eps: Times fall evenly from 1 to this one (Dream: 0.001, MDLM: 0.00001). None: 0.001 under "dream", else 0.
        score_distribution: Whose probabilities the scores are: "model" (LLaDA, Fast-dLLM, dllm), at temperature 1 over
            the whole vocabulary; or "sampling" (Dream), what is drawn from, after temperature, top_k and top_p (Dream
            applies top_p before top_k; here top_k comes first, as everywhere).
        alg_temp: Dream's option of this name, for the rule "count": the tokens of a step are drawn without replacement
            from softmax(score / alg_temp), the score being a probability, a margin or minus an entropy. None or 0: the
            best ones.
        threshold, factor, entropy_budget: The number of that rule; None: 0.9, 1.0 and 0.15. "factor" is the rule of
            Fast-dLLM's paper; its public loop also takes the position at which it stops.
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
        suppress_tokens: Ids that are never chosen, beside the mask token (LLaDA's logits_eos_inf).
        begin_suppress_tokens: Ids, such as those that end a text, that are committed only after all others: they are
            drawn as ever, but come last in the order, and scores are those of the distribution without them. dllm's
            option of this name; LLaDA's confidence_eos_eot_inf, whose public code does it at temperature 0 alone.
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
        super().__init__(**{**_FIELDS, **{name: _plain(value) for name, value in kwargs.items()}})

    @staticmethod
    def option_defaults() -> dict[str, Any]:
        """The fields above and their defaults."""
        return dict(_FIELDS)

    @property
    def num_blocks(self) -> int:
        """Blocks of new tokens."""
        return -(-self.max_new_tokens // self.block_length) if self.block_length else min(self.max_new_tokens, 1)

    @property
    def steps_per_block(self) -> int | None:
        """Steps of a block under "count" and "ancestral"; None: one per token."""
        if self.num_inference_steps is None:
            return None
        return -(-self.num_inference_steps // max(self.num_blocks, 1))

    @property
    def first_time(self) -> float:
        """The time at which the steps end: eps, or what None means."""
        return (DREAM_EPS if self.unmasking_schedule == "dream" else 0.0) if self.eps is None else self.eps

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
        for name, known in CHOICES.items():
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
        for name in ("suppress_tokens", "begin_suppress_tokens", "cfg_keep_tokens"):
            tokens = getattr(self, name)
            if tokens is not None and not isinstance(tokens, list | tuple):
                raise ValueError(f"{name}: got {tokens!r}; expected a list of token ids, or None")
            for token in tokens or ():
                _integer(name, token, 0)
        for name in ("eos_token_id", "pad_token_id"):
            ids = getattr(self, name)
            for token in ids if isinstance(ids, list | tuple) else [ids]:
                _integer(name, token, 0, optional=True)
        if self.cfg_keep_tokens and self.guidance_scale == 1:
            raise ValueError("cfg_keep_tokens: got some without guidance; set guidance_scale, or leave it out")
        self._validate_rule()
        self._validate_schedule()

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

    def _validate_schedule(self) -> None:
        rule, schedule = self.unmasking_rule, self.unmasking_schedule
        if self.eps is not None:
            _number("eps", self.eps, lambda x: 0 <= x < 1, "a number in [0, 1)")
        if self.alg_temp is not None:
            _number("alg_temp", self.alg_temp, lambda x: x >= 0, "a number of 0 or above")
        counted, stepped = rule == "count", rule in ("count", "ancestral")
        unscored = self.unmasking_order == "random" or rule == "ancestral"
        here = f"unmasking_rule={rule!r}, unmasking_order={self.unmasking_order!r}, unmasking_schedule={schedule!r}"
        wrong = {  # what was given without an effect, and what would have it
            "unmasking_schedule": (schedule != "even" and not stepped, 'unmasking_rule="count" or "ancestral"'),
            "eps": (self.eps is not None and (not stepped or (counted and schedule == "even")),
                    'unmasking_rule="ancestral", or "count" with another unmasking_schedule'),
            "alg_temp": (bool(self.alg_temp) and (not counted or unscored),
                         'unmasking_rule="count" and an order by scores'),
            "begin_suppress_tokens": (bool(self.begin_suppress_tokens) and unscored, "an order by scores"),
            "score_distribution": (self.score_distribution != "model" and unscored, "an order by scores"),
        }  # fmt: skip
        for name, (without_effect, expected) in wrong.items():
            if without_effect:
                value = getattr(self, name)
                raise ValueError(f"{name}: got {value!r} with {here}; expected {expected}, or leave {name} out")
        if rule == "ancestral" and self.num_inference_steps is None and not self.max_new_tokens:
            raise ValueError("num_inference_steps: got None; the rule ancestral needs it where max_new_tokens is 0")


def merged_options(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`defaults` (a recipe's `sampling.generation`), replaced by what was given.

    What belongs to a rule that the command line leaves is dropped with it: `--unmasking-rule count` on a recipe with
    a threshold.
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
            numbers |= {"num_inference_steps", "unmasking_schedule", "eps"}
        if rule != "count":
            numbers.add("alg_temp")
        for name in numbers & defaults.keys() - given.keys():
            options.pop(name, None)
    return options


def _plain(value: Any) -> Any:
    """NumPy's numbers and arrays, and ranges, as Python's numbers and lists; anything else as it is."""
    if isinstance(value, range):
        return list(value)
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


def _integer(name: str, value: Any, least: int, optional: bool = False) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least or value >= 2**63:
        expected = "an int" if least < 0 else f"an int of {least} or more"
        if isinstance(value, int) and value >= 2**63:
            expected = "an int below 2^63"
        raise ValueError(f"{name}: got {value!r}; expected {expected}{' or None' if optional else ''}")


def _number(name: str, value: Any, fits: Any, expected: str) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not fits(value):
        raise ValueError(f"{name}: got {value!r}; expected {expected}")
