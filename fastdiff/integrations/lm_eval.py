"""Masked diffusion language models in EleutherAI's lm-evaluation-harness (`lm_eval`).

What the harness calls a log-likelihood is here minus the Monte-Carlo bound of `fastdiff.evaluation.likelihood`, as
LLaDA (Nie et al. 2025, Appendix B.5) evaluates: a lower bound on the model's log-likelihood, with its noise.
"""

import dataclasses
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastdiff.diffusion.masked import MaskedDiffusion, MaskedDiffusionConfig, MaskedTokens
from fastdiff.errors import one_line
from fastdiff.evaluation.likelihood import sequence_losses
from fastdiff.generation import MaskedDiffusionGenerationConfig, generate
from fastdiff.generation.canvas import padded
from fastdiff.generation.text import TextGenerator

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"lm-eval tasks need the package {error.name}; pip install 'fastdiff-kernels[lm-eval]'"
    ) from None

_BOOTSTRAP = 1000  # resamplings for the standard error of metrics that are not means


@dataclasses.dataclass(frozen=True)
class _Row:
    """A request's tokens, or one draw of it."""

    request: int
    condition: list[int]  # what an encoder sees; empty for models without
    ids: Tensor  # int64 [L]
    maskable: Tensor  # bool [L]: the continuation
    mask: Tensor  # bool [L]
    weight: float


class FastdiffLM(TemplateLM):
    """A masked diffusion language model as the harness sees it.

    - `loglikelihood`: minus the bound of the continuation given the context, from `num_draws` masks (one where the
      continuation is one token: there is one mask). `is_greedy`: whether decoding at temperature 0, one token per step,
      the most confident first, gives the continuation.
    - `loglikelihood_rolling`: the same of a whole text, in windows of the model's positions, each token once; a window
      sees the token before it, the last one as much as fits.
    - `generate_until`: text of `fastdiff.generation.generate`, cut at the first of the task's `until` strings.

    Texts become tokens as in the model's training (`fastdiff.data.TextCodec`), and what stands before a text without
    context is its `start`. Contexts that are too long lose their beginning.

    Args:
        model: a `fastdiff.models.MaskedDiffusionLM`.
        tokenizer: its tokenizer.
        config: how to generate; a task's `max_gen_toks` replaces max_new_tokens, with as many tokens per step. Its
            guidance_scale holds for likelihoods, too, as in LLaDA's evaluation.
        num_draws: masks for each log-likelihood.
        batch_size: rows computed at once.
        seed: seed of the masks; those of a request depend on it and the request's tokens alone.
        process: gives the masks and, to a model with timestep embedding, times; None is the linear schedule.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        config: MaskedDiffusionGenerationConfig | None = None,
        *,
        num_draws: int = 128,
        batch_size: int = 32,
        seed: int = 0,
        process: MaskedDiffusion | None = None,
    ) -> None:
        super().__init__()
        if num_draws < 1 or batch_size < 1:
            raise ValueError(f"num_draws: got {num_draws} and batch_size {batch_size}; expected at least 1")
        self.text = TextGenerator(model, tokenizer, config or MaskedDiffusionGenerationConfig())
        self.model, self.tokenizer, self._device = model, tokenizer, model.head_weight.device
        self.num_draws, self.batch_size, self.seed = num_draws, batch_size, seed
        self.process = process or MaskedDiffusion(MaskedDiffusionConfig(), self.text.mask_token_id)
        self.max_length: int = model.config.max_position_embeddings
        self.codec = self.text.codec
        if not self.codec.start:
            raise ValueError(
                "bos_token_id: neither tokenizer nor model has one, nor an EoS token, to stand before a text; set one"
            )
        if self.text.has_encoder and self.text.start_token_id is None:
            raise ValueError(
                "bos_token_id: neither model nor tokenizer has one, from which a model with encoder starts; set it"
            )

    # ------------------------------------------------------------------------------------------ tokens

    @property
    def eot_token_id(self) -> int:
        """The end token."""
        return (*self.text.end_token_ids, *self.codec.start)[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        return self.codec.start[0]

    @property
    def tokenizer_name(self) -> str:
        """The name in the harness's caches."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text; add_special_tokens=False: without what stands before one."""
        begins = bool(self.tokenizer.bos_token) and string.startswith(self.tokenizer.bos_token)  # a chat template's
        inside = begins if add_special_tokens is None else not add_special_tokens
        return self.codec.encode_inside(string) if inside else self.codec.encode(string)

    # ------------------------------------------------------------------------------------------ likelihood

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, greedy: bool = True
    ) -> list[tuple[float, bool]]:
        rows = [self._row(i, context, continuation) for i, (_, context, continuation) in enumerate(requests)]
        losses = torch.zeros(len(rows), dtype=torch.float64)
        total = sum(map(self._num_draws, rows))
        with tqdm(total=total, unit="draw", desc="log-likelihood", disable=disable_tqdm) as bar:
            draws = self._draws(sorted(rows, key=lambda row: len(row.ids)))
            while batch := list(islice(draws, self.batch_size)):
                losses.index_add_(0, torch.tensor([draw.request for draw in batch]), self._losses(batch))
                bar.update(len(batch))
        is_greedy = self._greedy(rows) if greedy else [False] * len(rows)
        results = []
        for row, (texts, _, _), loss, same in zip(rows, requests, losses.tolist(), is_greedy, strict=True):
            result = (-loss / max(self._num_draws(row), 1), same)
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, result)
            results.append(result)
        return results

    def _row(self, request: int, context: list[int], continuation: list[int]) -> _Row:
        """Context and continuation as one row, or apart where the model has an encoder; cut to its positions."""
        condition: list[int] = []
        if self.text.has_encoder:
            condition, context = context[-self.max_length :], [self.text.start_token_id]
        if len(continuation) > self.max_length:
            raise ValueError(
                f"continuation: got {len(continuation)} tokens; expected at most {self.max_length}, the model's "
                "positions"
            )
        room = self.max_length - len(continuation)
        context = context[len(context) - min(room, len(context)) :]
        ids = torch.tensor(context + continuation, dtype=torch.int64)
        # where an ordinary token is the mask token, its own probability cannot be asked for
        maskable = (torch.arange(len(ids)) >= len(context)) & (ids != self.text.mask_token_id)
        return _Row(request, condition, ids, maskable, maskable, 1.0)

    def _num_draws(self, row: _Row) -> int:
        tokens = int(row.maskable.sum())
        return tokens if tokens < 2 else self.num_draws

    def _draws(self, rows: Sequence[_Row]) -> Iterator[_Row]:
        for row in rows:
            count = self._num_draws(row)
            if not count:
                continue
            key = zlib.crc32(row.ids.numpy().tobytes(), zlib.crc32(str(self.seed).encode()))
            generator = torch.Generator().manual_seed(key)
            masked = self.process.mask_for_likelihood(
                row.ids.expand(count, -1), row.maskable.expand(count, -1), generator
            )
            for mask, weight in zip(masked.mask, masked.weight.tolist(), strict=True):
                yield dataclasses.replace(row, mask=mask, weight=weight)

    @torch.no_grad()
    def _losses(self, batch: Sequence[_Row]) -> Tensor:  # float64 [B]
        clean, attention = padded([row.ids.tolist() for row in batch], torch.device("cpu"))
        mask = torch.zeros_like(attention)
        for index, row in enumerate(batch):
            mask[index, : len(row.mask)] = row.mask
        weight = torch.tensor([row.weight for row in batch])
        masked = MaskedTokens(clean.masked_fill(mask, self.text.mask_token_id), mask, weight)
        counts = torch.tensor([int(row.maskable.sum()) for row in batch])
        encoder = self._condition(batch)
        if encoder:
            states = self.model.encode(encoder["encoder_input_ids"], encoder["encoder_attention_mask"])
            encoder = {"encoder_hidden_states": states, "encoder_attention_mask": encoder["encoder_attention_mask"]}
        given = attention.clone()
        for index, row in enumerate(batch):
            given[index, : len(row.maskable)] &= ~row.maskable
        guided = dict(guidance_scale=self.text.config.guidance_scale, given=given)
        return sequence_losses(self.model, self.process, clean, masked, counts, attention, **guided, **encoder)

    def _condition(self, rows: Sequence[_Row]) -> dict[str, Tensor]:
        if not self.text.has_encoder:
            return {}
        ids, seen = padded([row.condition for row in rows], self._device)
        return {"encoder_input_ids": ids, "encoder_attention_mask": seen}

    def _greedy(self, rows: Sequence[_Row]) -> list[bool]:
        """Whether filling the whole continuation, one token per step and the most confident first, gives it back."""
        config = MaskedDiffusionGenerationConfig(
            max_new_tokens=0,
            seed=0,
            guidance_scale=self.text.config.guidance_scale,
            suppress_tokens=self.text.silent_token_ids or None,
        )
        same = [True] * len(rows)
        wanted = sorted((row for row in rows if bool(row.maskable.any())), key=lambda row: int(row.maskable.sum()))
        for start in range(0, len(wanted), self.batch_size):
            batch = wanted[start : start + self.batch_size]
            masked = [self._to_fill(row) for row in batch]
            ids, real = padded(masked, self._device)
            filled = generate(self.model, ids, real, config, **self._condition(batch)).sequences.cpu()
            for row, tokens in zip(batch, filled, strict=True):
                same[row.request] = bool((tokens[: len(row.ids)] == row.ids)[row.maskable].all())
        return same

    def _to_fill(self, row: _Row) -> list[int]:
        """A row's tokens with all that it asks for masked, and nothing else."""
        ids = torch.tensor(self.codec.as_given(row.ids.tolist()))
        return ids.masked_fill(row.maskable, self.text.mask_token_id).tolist()

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Minus the bound of whole texts."""
        windows, owners = [], []
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            pairs = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length - 1, 1)
            for context, continuation in map(make_disjoint_window, pairs):
                windows.append((None, context, continuation))
                owners.append(index)
        sums = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm, False), strict=True):
            sums[owner] += value
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    # ------------------------------------------------------------------------------------------ generation

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Generated texts, each cut at the first of its `until` strings."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(index)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), unit="text", desc="generation", disable=disable_tqdm) as bar:
            for members in groups.values():
                options = requests[members[0]].args[1]
                until = options.get("until") or []
                until = [until] if isinstance(until, str) else until
                wanted = int(options.get("max_gen_toks") or self.text.config.max_new_tokens)
                text = TextGenerator(self.model, self.tokenizer, self._config(options, wanted))
                rows = [self._context(requests[i].args[0], text.config.max_new_tokens) for i in members]
                prompts = [requests[i].args[0] for i in members]
                for batch in text.generate(prompts, rows, batch_size=self.batch_size):
                    for answer in batch:
                        index = members[answer.row]
                        texts[index] = _until(answer.text, until)
                        self.cache_hook.add_partial("generate_until", requests[index].args, texts[index])
                    bar.update(len(batch))
        return texts

    def _config(self, options: dict[str, Any], new_tokens: int) -> MaskedDiffusionGenerationConfig:
        """The generation config for a task's length and, where it samples, its temperature, top_k and top_p."""
        config = self.text.config
        fields = {name: getattr(config, name) for name in config.option_defaults()}
        if options.get("do_sample"):
            fields["temperature"] = 1.0 if options.get("temperature") is None else float(options["temperature"])
            fields |= {name: options[name] for name in ("top_k", "top_p") if options.get(name) is not None}
        if fields["seed"] is None:
            fields["seed"] = self.seed
        fields["max_new_tokens"] = new = max(min(new_tokens, self.max_length - 1), 1)
        if config.num_inference_steps is not None:
            share = config.steps_per_block * -(-new // config.block_length) if config.block_length else None
            old = max(config.max_new_tokens, 1)
            fields["num_inference_steps"] = share or max(-(-config.num_inference_steps * new // old), 1)
        return MaskedDiffusionGenerationConfig(**fields)

    def _context(self, context: str, new_tokens: int) -> list[int]:
        ids = self.tok_encode(context) or [self.prefix_token_id]
        room = self.max_length if self.text.has_encoder else self.max_length - new_tokens
        return self.codec.as_given(ids[-max(room, 1) :])


def _until(text: str, until: Sequence[str]) -> str:
    for stop in until:
        if stop:
            text = text.split(stop)[0]
    return text


def find_tasks(tasks: Sequence[str], include_path: str | None = None) -> TaskManager:
    """A task manager that has the tasks.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a task that lm-eval does not know.
    """
    if include_path is not None and not os.path.isdir(include_path):
        raise FileNotFoundError(
            f"--lm-eval-include-path: got {include_path!r}, which is not a folder; expected one of task files"
        )
    if include_path is not None:  # reading the thousands of tasks that lm-eval brings takes long
        manager = TaskManager(include_path=include_path, include_defaults=False)
        if all(task in manager.all_tasks for task in tasks):
            return manager
    manager = TaskManager(include_path=include_path)
    for task in tasks:
        if task not in manager.all_tasks:
            raise ValueError(
                f"--lm-eval: got {task!r}, which lm-eval does not know; `lm-eval ls tasks` lists its tasks, "
                "--lm-eval-include-path adds a folder of your own"
            )
    return manager


def run_tasks(
    adapter: FastdiffLM,
    tasks: Sequence[str],
    manager: TaskManager,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> dict[str, Any]:
    """Results of lm-eval's `simple_evaluate`.

    Raises ValueError where a task's data cannot be loaded.
    """
    try:
        return simple_evaluate(
            model=adapter,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            log_samples=False,
            bootstrap_iters=_BOOTSTRAP,
        )
    except OSError as error:  # datasets: no network, no such file
        raise ValueError(f"--lm-eval {','.join(tasks)}: its data cannot be loaded: {one_line(error)}") from error


def table(results: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    return make_table(results).strip()
