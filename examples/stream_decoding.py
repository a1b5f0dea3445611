"""Decode a masked language model, and see each step: a streamer of your own."""

import sys

import train_language_model


class Streamer:
    """Prints the text as it stands after each step, masks as "_", and which places the step filled."""

    def __init__(self, tokenizer, mask_token_id):
        self.tokenizer, self.mask_token_id, self.before = tokenizer, mask_token_id, None

    def __call__(self, token_ids, step):  # int64 [B, prompt + new tokens], from step 0
        row = token_ids[0].tolist()  # the first row of the batch
        chosen = [i for i, token in enumerate(row) if token != self.mask_token_id]
        new = chosen if self.before is None else sorted(set(chosen) - set(self.before))
        tokens = ["_" if token == self.mask_token_id else self.tokenizer.decode(token) for token in row]
        print(f"step {step:2}, {len(new)} new: {' '.join(tokens).replace(self.tokenizer.eos_token, '.')}")
        self.before = chosen


def main(run="runs/example_numbers", prompt="4096", max_new_tokens=16, **training):
    loaded = train_language_model.main(run, **training)
    streamer = Streamer(loaded.tokenizer, loaded.model.config.mask_token_id)
    # "threshold" chooses all tokens that the model is sure of at once, so that it takes fewer steps than tokens.
    (sample,) = loaded.generate(
        prompt, max_new_tokens=max_new_tokens, unmasking_rule="threshold", threshold=0.9, streamer=streamer
    )
    print(f"{prompt} is {sample.text!r}")
    return sample


if __name__ == "__main__":
    main(*sys.argv[1:3])
