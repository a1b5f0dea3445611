"""Self-attention on one packed projection: reference."""
