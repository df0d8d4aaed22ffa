"""Commands in a wrong environment: one sentence that names the remedy."""

import ast
import os
import subprocess
import sys

import pytest
from paths import ROOT

REMEDY = "activate the project's environment (`source .venv/bin/activate`; `make` creates it) or `pip install .`\n"


def python(*arguments) -> subprocess.CompletedProcess:
  """Run this Python without site-packages."""
  environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
  return subprocess.run(
    [sys.executable, "-S", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
  )


OLD = "import sys; sys.version_info = (3, 10, 13); import experiments.pretrain"


@pytest.mark.parametrize(
  ("arguments", "problem"),
  [
    (["-m", "experiments.pretrain", "--dry_run"], "the packages jax and absl are not installed for this Python 3."),
    (["-c", OLD], "expected Python 3.11 or newer, found Python 3.10 ("),
  ],
)
def test_a_wrong_environment_is_one_sentence(arguments, problem):
  done = python(*arguments)
  assert done.returncode == 2 and done.stdout == ""
  assert done.stderr.startswith(f"error: {problem}") and done.stderr.endswith(REMEDY) and done.stderr.count("\n") == 1


def test_old_versions_of_python_can_parse_the_check():
  ast.parse((ROOT / "experiments" / "__init__.py").read_text(), feature_version=(3, 7))
