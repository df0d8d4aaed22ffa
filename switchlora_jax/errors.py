"""Exceptions that end a run, and its exit codes. Commands print these exceptions as one line, without a traceback."""

import contextlib
import sys

STOPPED = 75  # exit code of a run that a signal stopped, with nothing lost; EX_TEMPFAIL: the same command continues it
HUNG = 69  # exit code of a run that hung, or that lost a process; EX_UNAVAILABLE


class UserError(ValueError):
  """An invalid flag, config, file or directory. The message states what was expected, what was found, and a remedy."""


class Stopped(Exception):
  """The run was stopped by a signal before its last step."""


class RunFailed(RuntimeError):
  """The run hung, or another of its processes failed or was lost."""


def to_stderr(text: str):
  """Print to stderr from any thread. A closed terminal or a full disk is ignored, since the process may be ending."""
  with contextlib.suppress(OSError, ValueError):
    sys.stderr.write(f"\n{text}\n")
    sys.stderr.flush()


def one_line(error: Exception) -> str:
  """Type and message of a library's error, on one line."""
  return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
