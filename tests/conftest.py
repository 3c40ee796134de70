"""Fixtures shared by the tests."""

import jax
import pytest


@pytest.fixture
def x64():
    """float64 for one test: exactness is asserted there, where rounding cannot hide a wrong term."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)
