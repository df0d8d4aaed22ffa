"""One process at a time in a directory: a lock that ends with its process, however that ends."""

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

NAME = ".lock"  # of the file, in the directory that it stands for


class Taken(Exception):
  """Another process has the lock; says which, on which machine, since when."""


@contextlib.contextmanager
def alone(folder: Path, *, wait: bool, name: str = NAME) -> Iterator[None]:
  """While no other process holds a lock of `folder`, which exists; the file `name` says which has it, and stays.

  On a full disk it holds as well, and does not say which process has it.

  Args:
    wait: for the other process; else raise.
  Raises:
    Taken: another process has it, and `wait` is False.
    OSError: the file cannot be opened, or its file system has no locks.
  """
  with (folder / name).open("ab+", buffering=0) as file:  # not "w", which would empty another's
    try:
      fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
      if error.errno not in (errno.EAGAIN, errno.EACCES):
        raise
      file.seek(0)
      raise Taken(file.read().decode(errors="replace").strip() or "a process that has not said which it is") from None
    holder = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
    file.truncate(0)
    with contextlib.suppress(OSError):
      file.write(holder.encode())
    try:
      yield
    finally:
      file.truncate(0)
