"""Fault injection: `make faults` runs all tests; those marked `telling` belong to the default tests as well."""

from pathlib import Path

import pytest
from hurt_runs import finish, finish_pair, small

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config, items):
  """Leave the longer faults to `make faults`, which passes `--faults`."""
  if config.getoption("--faults"):
    return
  left_out = [item for item in items if HERE in item.path.parents and not item.get_closest_marker("telling")]
  config.hook.pytest_deselected(items=left_out)
  items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
  """(folder with the text, workdir) of the uninterrupted run of `small`."""
  folder = tmp_path_factory.mktemp("whole")
  finish(small(folder), folder / "whole")
  return folder, folder / "whole"


@pytest.fixture(scope="session")
def whole_pair(whole):
  """The same of the uninterrupted run by two processes with one device each."""
  folder, _ = whole
  finish_pair(small(folder), folder / "pair")
  return folder, folder / "pair"
