"""QGFD attention in a transformers model: a ViT that reads digits, with plain and with diffused attention."""

import tempfile

import torch
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification

from fastdiff.integrations.transformers import use_qgfd


def main(epochs=10, hidden_size=64, layers=2):
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(digits.target)
    train, test = slice(300, None), slice(0, 300)
    config = dict(image_size=8, patch_size=2, num_channels=1, num_labels=10, num_attention_heads=4)
    config |= dict(hidden_size=hidden_size, intermediate_size=2 * hidden_size, num_hidden_layers=layers)

    accuracies = {}
    for steps in (0, 1):  # hops of the chain; 0 is plain attention, through transformers' own SDPA function
        torch.manual_seed(0)
        model = ViTForImageClassification(ViTConfig(**config))
        use_qgfd(model, steps=steps, alpha=0.3)  # one line; the weights and everything else stay
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for _ in range(epochs):
            for batch in torch.randperm(len(labels[train])).split(64):
                model(images[train][batch], labels=labels[train][batch]).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        with torch.no_grad():
            logits = model.eval()(images[test]).logits
        accuracies[steps] = (logits.argmax(-1) == labels[test]).float().mean().item()
        print(f"{steps} hops: {accuracies[steps]:.1%} of {len(labels[test])} held-out digits right")

    with tempfile.TemporaryDirectory() as folder:  # the settings are saved with the model, the implementation is not
        model.save_pretrained(folder)
        again = ViTForImageClassification.from_pretrained(folder, attn_implementation="qgfd").eval()
    with torch.no_grad():
        same = torch.equal(again(images[test]).logits, logits)
    print(f"saved and loaded with {again.config.qgfd}: the same logits: {same}")
    return accuracies, same


if __name__ == "__main__":
    main()
