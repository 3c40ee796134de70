"""Fixtures for all tests."""

import os
import tempfile
from pathlib import Path

import jax
import pytest


def pytest_configure(config):
    """For pytest's workers and for the programs that tests start: one folder of compiled programs for all, which lack the
    compiler's last efforts, since they take long to compile and run for moments."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="grpo_jax-tests-", ignore_cleanup_errors=True)
        config.add_cleanup(folder.cleanup)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture(scope="session")
def environment() -> dict:
    """Of programs that tests start."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1]), "JAX_PLATFORMS": "cpu"}


@pytest.fixture
def x64():
    """float64 for one test: exactness is asserted there, where rounding cannot hide a wrong term."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Lets go of a module's compiled programs: those of the whole suite together take more memory maps than Linux gives one
    process (vm.max_map_count, 65530), and the compiler then dies."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """A Hugging Face folder: a random Qwen2 model of 20k parameters with the demo's tokenizer; it has learned nothing."""
    from data import demo
    from models import decoder, hf

    tokenizer = demo.build_tokenizer(demo.tokenizer_texts(demo.sft_rows(300, 0, 0.0)), 400)
    eos = (tokenizer.eos_token_id,)
    config = decoder.DecoderConfig("qwen2", len(tokenizer), 32, 48, 2, 4, 2, 8, 1e4, max_positions=1024, eos_token_ids=eos)
    folder = tmp_path_factory.mktemp("tiny") / "model"
    params = jax.tree.map(lambda x: 5 * x, decoder.init(config, jax.random.key(0)))  # larger: rewards and tokens vary
    hf.save(folder, config, params, tokenizer, dtype="float32")
    return str(folder)


@pytest.fixture
def optimized():
    """For a test of what the compiler makes of a program."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
