"""The masked diffusion loss in a training loop of your own: head and cross entropy of masked rows alone."""

import torch
from num2words import num2words
from torch import nn
from torch.nn.functional import cross_entropy

from fastdiff.diffusion import MaskedDiffusion, MaskedDiffusionConfig
from fastdiff.ops import masked_linear_cross_entropy

LENGTH, MASK = 32, 256  # bytes of a text; ids 0 … 255 are bytes


def main(max_steps=400, dim=96, batch_size=32):
    torch.manual_seed(0)
    texts = torch.tensor([list(num2words(number).ljust(LENGTH).encode()) for number in range(1000)])  # [1000, LENGTH]
    # Any network that gives hidden states will do; the head is a weight [V, D].
    layer = nn.TransformerEncoderLayer(dim, 4, 2 * dim, dropout=0.0, batch_first=True, norm_first=True)
    net = nn.ModuleDict({"embed": nn.Embedding(MASK + 1, dim), "places": nn.Embedding(LENGTH, dim),
                         "body": nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
                         "head": nn.Linear(dim, MASK + 1, bias=False)})  # fmt: skip
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    process = MaskedDiffusion(MaskedDiffusionConfig(), MASK)  # mask rate t and weight 1/t, as in MDLM and LLaDA
    losses = []
    for step in range(max_steps):
        targets = texts[torch.randint(len(texts), (batch_size,))]
        masked = process.corrupt(targets, process.sample_times(batch_size))
        hidden = net["body"](net["embed"](masked.input_ids) + net["places"].weight)  # [B, L, D]
        # The logits [B, L, V] are never whole in memory, and rows that are not masked cost nothing.
        loss, row_loss = masked_linear_cross_entropy(
            hidden, net["head"].weight, targets, masked.mask, row_weight=masked.weight[:, None], suppress_tokens=[MASK]
        )
        loss = loss / targets.numel()  # you choose what the sum is divided by; so it is a bound on the nats per byte
        if step == 0:  # the usual way, for comparison: all logits, then those of masked rows
            logits = net["head"](hidden)[masked.mask][:, :MASK]
            usual = cross_entropy(logits, targets[masked.mask], reduction="none")
            difference = (usual - row_loss[masked.mask]).abs().max().item()
            print(f"{len(usual)} of {targets.numel()} rows are masked; largest difference {difference:.1e}")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}: {sum(losses[-50:]) / 50:.3f} nats per byte")
    return difference, losses


if __name__ == "__main__":
    main()
