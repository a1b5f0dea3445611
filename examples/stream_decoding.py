"""Decode a masked language model, and see each step: a streamer of your own."""

import sys

import train_language_model


class Streamer:
    """Prints the text as it stands after each step, masks as "_" and end tokens as "."."""

    def __init__(self, tokenizer, mask_token_id):
        self.tokenizer = tokenizer
        self.signs = {mask_token_id: "_", tokenizer.eos_token_id: "."}
        self.left = []  # masks after each step

    def __call__(self, token_ids, step):  # int64 [B, prompt + new tokens], and the number of the step from 0
        row = token_ids[0].tolist()  # of several prompts, the first
        pieces = [self.signs.get(token) or self.tokenizer.decode(token).strip() for token in row]
        self.left.append(pieces.count("_"))
        print(f"step {step}, {self.left[-1]:2} masks left: {' '.join(pieces)}")


def main(run="runs/example_numbers", prompt="4096", max_new_tokens=16, **training):
    loaded = train_language_model.main(run, **training)
    streamer = Streamer(loaded.tokenizer, loaded.model.config.mask_token_id)
    # Blocks of 8 from left to right; "threshold" chooses all tokens of which the model is sure at once.
    (sample,) = loaded.generate(
        prompt,
        max_new_tokens=max_new_tokens,
        block_length=8,
        unmasking_rule="threshold",
        threshold=0.98,
        streamer=streamer,
    )
    print(f"{prompt} is {sample.text!r}")
    return sample, streamer.left


if __name__ == "__main__":
    main(*sys.argv[1:3])
