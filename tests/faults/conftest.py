"""Fault injection. `make faults` runs all tests; `make test` runs those marked `in_default_tests`."""

from pathlib import Path

import pytest
from fault_runs import finish, finish_pair, small_config

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config, items):
  """Deselects the tests without the mark, unless `--faults` is passed, as by `make faults`."""
  if config.getoption("--faults"):
    return
  deselected = [item for item in items if HERE in item.path.parents and not item.get_closest_marker("in_default_tests")]
  config.hook.pytest_deselected(items=deselected)
  items[:] = [item for item in items if item not in deselected]


@pytest.fixture(scope="session")
def uninterrupted_run(tmp_path_factory):
  """(folder with the text, workdir) of the uninterrupted run of `small_config`."""
  folder = tmp_path_factory.mktemp("whole")
  finish(small_config(folder), folder / "whole")
  return folder, folder / "whole"


@pytest.fixture(scope="session")
def uninterrupted_pair(uninterrupted_run):
  """(folder with the text, workdir) of the uninterrupted run by two processes with one device each."""
  folder, _ = uninterrupted_run
  finish_pair(small_config(folder), folder / "pair")
  return folder, folder / "pair"
