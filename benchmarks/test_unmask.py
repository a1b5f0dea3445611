"""unmask_ against the public loops over rows (LLaDA, Fast-dLLM, entropy-bounded) and MDLM's ancestral step.

Every call starts from the same masked ids, which all contenders copy back first. The loops get probabilities, as their
public code has them; both find the masks themselves. Every case first compares what is committed with the reference.
"""

import baselines
import measure
import pytest
import torch
from torch import Tensor

from fastdiff.kernels.unmask import reference
from fastdiff.ops import TokenSample, unmask_

BATCH, LENGTH, VOCAB = 64, 1024, 32000
MASK = VOCAB
ROUNDS = {"count": 40, "threshold": 5, "factor": 20, "entropy_budget": 40, "ancestral": 40}
NUMBERS = {"count": 16, "threshold": 0.9, "factor": 1.5, "entropy_budget": 0.15, "ancestral": 1 / 64}
ARGUMENTS = {rule: rule for rule in NUMBERS} | {"ancestral": "probability"}
ORDERS = {"entropy_budget": "entropy"}  # confidence elsewhere
LOOP_TARGET = {"loop": 20.0}  # MDLM's step is not a loop: nothing is aimed at there


def inputs(masked: str) -> tuple[Tensor, TokenSample]:
    """Token ids with half or all positions masked; a sample with the statistics of random logits."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCAB, (BATCH, LENGTH), generator=generator)
    where = torch.rand(BATCH, LENGTH, generator=generator) < (0.5 if masked == "half" else 1.1)
    log_p = (4 * torch.randn(BATCH, LENGTH, 64, generator=generator)).log_softmax(-1)
    top = log_p.exp().topk(2).values
    token = torch.randint(VOCAB, (BATCH, LENGTH), generator=generator)
    sample = TokenSample(token, log_p.amax(-1), -(log_p.exp() * log_p).sum(-1), top[..., 0] - top[..., 1])
    ids = torch.where(where, MASK, ids).to(measure.DEVICE)
    return ids, TokenSample(*(t.to(measure.DEVICE) for t in sample[:4]))


def loop(rule: str, ids: Tensor, sample: TokenSample):
    """The public step: from the mask, which positions are committed."""
    confidence, number = sample.log_prob.exp(), NUMBERS[rule]
    counts = torch.full((BATCH,), NUMBERS["count"], device=ids.device)
    return {
        "count": lambda mask: baselines.transfer_by_count(mask, confidence, counts),
        "threshold": lambda mask: baselines.transfer_by_threshold(mask, confidence, number),
        "factor": lambda mask: baselines.transfer_by_factor(mask, confidence, number),
        "entropy_budget": lambda mask: baselines.transfer_by_entropy_budget(mask, sample.entropy, number),
        "ancestral": lambda mask: baselines.transfer_ancestral(mask, number),
    }[rule]


def check(rule: str, order: str, start: Tensor, sample: TokenSample, ours: Tensor, theirs: Tensor) -> None:
    """Raises where fastdiff's result is not the reference's, or the loop's not fastdiff's."""
    batch, device = torch.arange(BATCH, device=start.device), start.device
    expected, _ = reference.unmask(
        start, *sample[:4], torch.zeros_like(batch), torch.full_like(batch, LENGTH), batch >= 0, rule, order,
        torch.full((BATCH,), float(NUMBERS[rule]), dtype=torch.float64, device=device), MASK,
        torch.tensor(1, device=device), torch.tensor(0, device=device), batch,
    )  # fmt: skip
    if not torch.equal(ours, expected):
        raise AssertionError("fastdiff's result is not the reference's: no speed-up is reported")
    if rule != "ancestral" and not torch.equal(ours, theirs):  # which draws other numbers
        raise AssertionError("the loop commits something else: nothing is compared")


@pytest.mark.parametrize("masked", ["half", "all"])
@pytest.mark.parametrize("rule", NUMBERS)
def test_unmask(rule, masked, benchmark, report):
    start, sample = inputs(masked)
    order, number = ORDERS.get(rule, "confidence"), {ARGUMENTS[rule]: NUMBERS[rule]}
    ours, theirs = start.clone(), start.clone()
    transfer = loop(rule, start, sample)

    def fused() -> None:
        ours.copy_(start)
        unmask_(ours, sample, MASK, rule=rule, order=order, seed=1, **number)

    def public() -> None:
        theirs.copy_(start)
        mask = theirs == MASK
        x0 = torch.where(mask, sample.token, theirs)
        chosen = transfer(mask)
        theirs[chosen] = x0[chosen]

    fused()
    public()
    check(rule, order, start, sample, ours, theirs)
    seconds = measure.in_turns(benchmark, {"fastdiff": fused, "loop": public}, ROUNDS[rule])
    targets = {} if rule == "ancestral" else LOOP_TARGET
    report(measure.speed_row(f"unmask_ {rule}, {order} [{BATCH}, {LENGTH}], {masked} masked", seconds, targets))
