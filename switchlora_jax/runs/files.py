"""Files that survive a kill: atomic writes, JSON with a checksum, SHA-256 of files, and a lock on a directory.

The package has three kinds of checksums:

  SHA-256 of a file, or of the contents of a JSON file   here; prepared data and everything small
  XXH3 of the files of a checkpoint                      `runs.manifest`; as fast as reading the files
  uint32 of an array, computed on its devices            `runs.array_checksums`; spans a save and its restore
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from switchlora_jax.errors import UserError

CHECKSUM_KEY = "sha256"  # of a checksummed JSON file: the digest of all other keys
LOCK_NAME = ".lock"  # of the lock file, in the directory that it protects
UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}  # by a file system


# --- atomic writes ------------------------------------------------------------------------------------------------


def write_bytes(path: Path, contents: bytes) -> None:
  """Writes a file atomically: at any time it is either the old file or the complete new one."""
  with atomic_writer(path) as file:
    file.write(contents)


def replace_text(path: Path, text: str) -> None:
  """Writes a text file in UTF-8 atomically; see `write_bytes`."""
  write_bytes(path, text.encode())


@contextlib.contextmanager
def atomic_writer(path: Path) -> Iterator:
  """A binary file to write to, which replaces `path` atomically when the context ends without an exception.

  The new file is on the disk when the context has ended, also after a power failure.
  """
  partial = path.with_name(f"{path.name}.partial")
  with partial.open("wb") as file:
    yield file
    file.flush()
    os.fsync(file.fileno())
  os.replace(partial, path)
  sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
  """Syncs the entries of a directory to the disk, if its file system can do so: some network drives cannot."""
  descriptor = os.open(directory, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  except OSError as error:
    if error.errno not in UNSUPPORTED:
      raise
  finally:
    os.close(descriptor)


# --- JSON and checksums -------------------------------------------------------------------------------------------


def write_checksummed_json(path: Path, contents: dict) -> None:
  """Writes a JSON object atomically, with the SHA-256 of its contents as one more key."""
  write_bytes(path, json.dumps(contents | {CHECKSUM_KEY: _json_sha256(contents)}, indent=1).encode())


def read_checksummed_json(path: Path) -> dict | None:
  """Reads what `write_checksummed_json` wrote, without the checksum; None if there is no such file.

  Raises:
    UserError: the file is damaged or cannot be read.
  """
  try:
    if not path.exists():
      return None
    contents = json.loads(path.read_bytes())
    if contents.pop(CHECKSUM_KEY) == _json_sha256(contents):
      return contents
    reason = "its checksum does not match its contents"
  except OSError as error:
    raise UserError(f"{path} must be a file that can be read; {error}; check its permissions") from error
  except (ValueError, AttributeError, LookupError, TypeError) as error:
    reason = error
  raise UserError(f"{path} is not the JSON that was written ({reason}); delete {path.parent}, and prepare it again")


def read_json_object(path: Path) -> dict:
  """Reads a JSON object that other software may have written, in UTF-8, UTF-16 or UTF-32, with or without a BOM.

  Raises:
    UserError: the file cannot be read, or it holds something else.
  """
  try:
    contents = json.loads(path.read_bytes())  # decodes by the BOM, which it drops
  except (OSError, ValueError) as error:
    raise UserError(f"{path} must be a JSON file; it cannot be read ({error}); write or download it again") from error
  if not isinstance(contents, dict):
    raise UserError(f"{path} must hold a JSON object; it holds {contents!r:.40}; write or download it again")
  return contents


def _json_sha256(contents: dict) -> str:
  return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


def file_sha256(path: Path) -> str:
  """SHA-256 of a file, hexadecimal."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


# --- lock ---------------------------------------------------------------------------------------------------------
# `filelock` does not record the holder of a lock, so the file would still be read and written here, and its releases
# before 4 empty the file of another holder when they try to acquire it.


class LockTaken(Exception):
  """Another process holds the lock; the message names the process, its machine and the time it acquired the lock."""


@contextlib.contextmanager
def exclusive_lock(directory: Path, *, wait: bool, name: str = LOCK_NAME) -> Iterator[None]:
  """Holds an exclusive lock on a directory, which must exist; the kernel releases it when the process ends in any way.

  The lock file keeps the description of the holder while the lock is held and is never removed. On a full disk the
  lock holds as well, but its holder is not recorded.

  Args:
    wait: whether to wait for the current holder rather than raise.
    name: of the lock file.
  Raises:
    LockTaken: another process holds the lock, and `wait` is False.
    OSError: the lock file cannot be opened, or its file system does not support locks.
  """
  with (directory / name).open("ab+", buffering=0) as file:  # "w" would erase the description of another holder
    try:
      fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
      if error.errno not in (errno.EAGAIN, errno.EACCES):
        raise
      file.seek(0)
      raise LockTaken(file.read().decode(errors="replace").strip() or "an unknown process") from None
    holder = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
    file.truncate(0)
    with contextlib.suppress(OSError):
      file.write(holder.encode())
    try:
      yield
    finally:
      file.truncate(0)
