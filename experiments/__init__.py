"""Commands, run by `python -m`; see the README. This file runs on any Python 3, to report a version that is too old."""

import importlib.util
import sys


def check_environment():
  """Exit with code 2 and one sentence unless this is Python 3.11 or newer with the required packages."""
  found = "Python {}.{}".format(*sys.version_info[:2])
  missing = [name for name in ("jax", "absl") if importlib.util.find_spec(name) is None]
  if sys.version_info < (3, 11):  # noqa: UP036
    problem = "expected Python 3.11 or newer, found " + found
  elif missing:
    problem = "the packages " + " and ".join(missing) + " are not installed for this " + found
  else:
    return
  remedy = "activate the project's environment (`source .venv/bin/activate`; `make` creates it) or `pip install .`"
  sys.stderr.write("error: {} ({}); {}\n".format(problem, sys.executable, remedy))  # noqa: UP032
  sys.exit(2)


check_environment()
