"""Norms and rotary positions of queries and keys: reference."""
