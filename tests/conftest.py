"""Eight simulated CPU devices, no silent broadcasting, and access to the recorded numbers."""

import gc
import time

import compiled_programs
import jax
import pytest
import shared_programs
from recorded import load
from small_model import TwoLinearBlock

from switchlora_jax.analysis import ranks
from switchlora_jax.models.llama import LLaMA
from switchlora_jax.training import phases

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", compiled_programs.FOLDER)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # their paths would be part of the entries' names
jax.config.update("jax_numpy_rank_promotion", "raise")
# Replaced before any test module imports them, so that all tests share what is compiled.
phases.build_phase, ranks.make_learnt_rank = shared_programs.build, shared_programs.make_learnt_rank
gc.freeze()  # what is imported stays: the collector need not walk it again and again

collect_ignore = ["helpers"]


@pytest.fixture(scope="module", autouse=True)
def programs_of_a_file(request):
  """Compile quickly, except in modules that are marked `user_flags`; drop the compiled programs after each module.

  Compilation takes most of the time of the tests, and XLA's optimizations about half of it. The environment of a child
  process selects its flags, see `tiny.QUICK`. A test process that kept all its programs would run out of memory
  mappings.
  """
  quick = request.node.get_closest_marker("user_flags") is None
  jax.config.update("jax_disable_most_optimizations", quick)
  with pytest.MonkeyPatch.context() as patch:
    if request.node.get_closest_marker("two_linear_layers"):
      patch.setattr(LLaMA, "block_class", TwoLinearBlock)
    yield
  shared_programs.forget()


@pytest.fixture
def golden():
  """name -> (arrays, what its .json says) of an extract in tests/golden."""
  return load


@pytest.fixture
def x64():
  """float64 for the length of one test."""
  with jax.enable_x64(True):
    yield


def pytest_addoption(parser):
  """`--faults`: see tests/faults/conftest.py; only this file may add options."""
  parser.addoption("--faults", action="store_true", help="run every injected fault, as `make faults` does")
  parser.addoption("--minutes", type=float, help="time limit: tests that have not started by then are skipped")
  parser.addoption(
    "--rotate", type=int, default=0, help="begin with another file of tests, for sessions with --minutes"
  )


def pytest_collection_modifyitems(config, items):
  """Rotate the files of tests by `--rotate`: sessions that have no time for all tests differ in those that they run."""
  files = list(dict.fromkeys(item.path for item in items))
  if files:
    first = config.getoption("--rotate") % len(files)
    place = {path: number for number, path in enumerate(files[first:] + files[:first])}
    items.sort(key=lambda item: place[item.path])


_begin = time.monotonic()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
  """Skip the test if the time of `--minutes` is over."""
  minutes = item.config.getoption("--minutes")
  if minutes is not None and time.monotonic() - _begin > 60 * minutes:
    pytest.skip(f"not started within the {minutes:g} minutes of --minutes")


def pytest_unconfigure():
  """Keep the compiled programs for the next session; the workers have ended."""
  compiled_programs.keep()
