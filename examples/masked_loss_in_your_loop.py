"""The masked diffusion loss in a training loop of your own: head and cross entropy of masked rows alone."""

import torch
from num2words import num2words
from torch import nn
from torch.nn.functional import cross_entropy

from fastdiff.diffusion import MaskedDiffusion, MaskedDiffusionConfig
from fastdiff.ops import masked_linear_cross_entropy

LENGTH, MASK = 32, 256  # bytes of a text; ids 0 … 255 are bytes


def main(max_steps=300, dim=96, batch_size=32):
    torch.manual_seed(0)
    texts = [num2words(number).ljust(LENGTH).encode() for number in range(1000)]
    data = torch.tensor([list(text) for text in texts])  # [1000, LENGTH]
    # Any network that gives hidden states will do; the head is a weight [V, D].
    embed, head = nn.Embedding(257, dim), nn.Linear(dim, 257, bias=False)
    layer = nn.TransformerEncoderLayer(dim, 4, 2 * dim, dropout=0.0, batch_first=True, norm_first=True)
    body, positions = (
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        nn.Parameter(torch.zeros(LENGTH, dim)),
    )
    parameters = [*embed.parameters(), *body.parameters(), *head.parameters(), positions]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    process = MaskedDiffusion(MaskedDiffusionConfig(), MASK)  # mask rate t, weight 1/t: MDLM and LLaDA

    losses = []
    for step in range(max_steps):
        targets = data[torch.randint(len(data), (batch_size,))]
        masked = process.corrupt(targets, process.sample_times(batch_size))
        hidden = body(embed(masked.input_ids) + positions)  # [B, L, D]
        # The logits [B, L, V] are never whole in memory; rows that are not masked cost nothing.
        loss, row_loss = masked_linear_cross_entropy(
            hidden, head.weight, targets, masked.mask, row_weight=masked.weight[:, None], suppress_tokens=[MASK]
        )
        loss = loss / targets.numel()  # you choose what the sum is divided by; here it bounds the nats per byte
        if step == 0:  # the usual way gives the same numbers
            rows = cross_entropy(head(hidden)[masked.mask][:, :MASK], targets[masked.mask], reduction="none")
            difference = (rows - row_loss[masked.mask]).abs().max().item()
            print(f"{masked.mask.sum()} of {targets.numel()} rows are masked; largest difference {difference:.1e}")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}: {sum(losses[-50:]) / 50:.3f} nats per byte")
    return difference, losses


if __name__ == "__main__":
    main()
