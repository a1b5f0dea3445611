"""`given`, `settings` and `st` of hypothesis. Where it is not installed, tests of properties are skipped; CI has it."""

import os

import pytest

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ImportError:
    if os.environ.get("CI"):
        raise

    class _Anything:
        """Stands for strategies that nobody draws from."""

        def __getattr__(self, name):
            return lambda *args, **kwargs: self

    st = _Anything()

    def given(*positional, **strategies):
        return pytest.mark.skip(reason="NOT TESTED: a property: hypothesis is not installed")

    def settings(**options):
        return lambda test: test


__all__ = ["given", "settings", "st"]
