"""How a run may end other than by its last step: commands print these as a sentence, without a traceback."""

import contextlib
import sys

STOPPED = 75  # exit code of a run that was told to stop and lost nothing; EX_TEMPFAIL: the same command continues
HUNG = 69  # exit code of a run that hangs or has lost a process; EX_UNAVAILABLE


class UserError(ValueError):
  """A mistake in a flag, a config, a file or a directory: what was expected, what was found, what to do."""


class Stopped(Exception):
  """A run was told to stop, and has saved what it did."""


def to_stderr(text: str):
  """Print from any thread, a run's last words perhaps; where the terminal is gone, go on all the same."""
  with contextlib.suppress(OSError, ValueError):
    sys.stderr.write(f"\n{text}\n")
    sys.stderr.flush()
