"""How sure is the model? The entropy of each position of an answer, from the first step of decoding to the last."""

import sys

import torch
import train_language_model
from matplotlib.figure import Figure

from fastdiff.ops import sample_tokens, unmask_


@torch.no_grad()
def main(run="runs/example_numbers", prompt="4096", output="uncertainty.png", max_new_tokens=12, **training):
    loaded = train_language_model.main(run, **training)
    model, tokenizer, mask_id = loaded.model, loaded.tokenizer, loaded.model.config.mask_token_id
    given = loaded.codec.encode(prompt)
    ids = torch.tensor([given + [mask_id] * max_new_tokens], device=model.device)  # [1, prompt + new tokens]
    entropies = []
    while (ids == mask_id).any():  # decoding by hand: predict, note the entropies, choose the surest token
        sample = sample_tokens(model(ids).logits, temperature=0, suppress_tokens=[mask_id])
        entropies.append(sample.entropy.masked_fill(ids != mask_id, float("nan"))[0, len(given) :])  # nats
        unmask_(ids, sample, mask_id, rule="count", count=1)
    entropy = torch.stack(entropies).cpu()  # [steps, new tokens]; NaN where a token was chosen before

    pieces = [tokenizer.decode(token) for token in ids[0, len(given) :].tolist()]
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(entropy.numpy(), cmap="viridis", vmin=0, aspect="auto")
    axes.set_xticks(range(len(pieces)), [repr(piece) for piece in pieces], rotation=45, ha="right")
    axes.set(title=f"{prompt} → {tokenizer.decode(ids[0, len(given) :], skip_special_tokens=True)}", ylabel="step")
    figure.colorbar(image, label="entropy, nats (white: chosen)")
    figure.savefig(output, dpi=120)
    for step, row in enumerate(entropy):
        print(f"step {step:2}:", " ".join("  . " if value.isnan() else f"{value:4.2f}" for value in row))
    print(f"the picture: {output}")
    return entropy


if __name__ == "__main__":
    main(*sys.argv[1:4])
