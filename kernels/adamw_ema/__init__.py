"""AdamW and a moving average of the weights in one pass: reference."""
