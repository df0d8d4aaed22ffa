"""Eight simulated CPU devices, no silent broadcasting, and access to the recorded numbers."""

import json
import os
from pathlib import Path

# Most of the tests' time is compilation: what one test or process has compiled, the others find. Read by JAX when
# it is imported, here and in the processes that tests start.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parents[1] / ".pytest_cache" / "xla")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def golden():
  """name -> (arrays, what its .json says) of an extract in tests/golden."""

  def load(name):
    with np.load(GOLDEN / f"{name}.npz") as arrays:
      return dict(arrays), json.loads((GOLDEN / f"{name}.json").read_text())

  return load


@pytest.fixture
def x64():
  """float64 for the length of one test."""
  with jax.enable_x64(True):
    yield
