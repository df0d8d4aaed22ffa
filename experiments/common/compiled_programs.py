"""JAX's persistent cache of compiled programs: a second start of a program does not compile it again.

JAX names an entry by a checksum of the program, the version of the compiler, its flags and the devices, but not the
number of cores, for which XLA divides the work when it compiles; each number has a folder of its own. JAX writes
entries in place, so that a process that is killed may leave a part of one, which JAX would report at every later start
and never replace. `enable` removes such parts, and the oldest entries beyond a limit.
"""

import contextlib
import logging
import os
import time
from pathlib import Path

import jax
import zstandard
from absl import flags

log = logging.getLogger(__name__)
LIMIT = 1 << 30  # bytes of entries that are kept
SECONDS = 0.3  # programs that compile faster are not stored
NONE = "none"
ENTRIES, CHECKED = "*-cache", "checked"  # the files of JAX, and a file of our own, as old as the last check

flags.disclaim_key_flags()


def define_flag():
  """Define the flag --compilation_cache, once for all commands of a process."""
  if "compilation_cache" in flags.FLAGS:
    return
  flags.DEFINE_string(
    "compilation_cache",
    None,
    f"folder of compiled programs for later starts; {NONE}: compile them at every start, also in runs that the command "
    "starts; default: compiled/ in data.cache_dir, if the command runs in one process",
  )


def enable(cache_dir: str) -> None:
  """Let JAX store compiled programs; without the flag, a folder that JAX's own setting or variable names is kept.

  A folder that cannot be used is reported by a warning, since a run needs none.

  Args:
    cache_dir: the folder of all caches.
  """
  given = flags.FLAGS.compilation_cache
  if given == NONE:
    jax.config.update("jax_enable_compilation_cache", False)
  if given == NONE or (given is None and jax.config.jax_compilation_cache_dir is not None):
    return
  folder = Path(given or Path(cache_dir) / "compiled").expanduser().absolute() / f"{_cores()}-cores"
  try:
    folder.mkdir(parents=True, exist_ok=True)
    _remove_parts(folder)
    _remove_oldest(folder)
  except (OSError, ValueError) as error:  # of a path with a null character
    log.warning("no compiled programs are stored in %s (%s); see --compilation_cache", folder, error)
    return
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # XLA's own files have no limit
  jax.config.update("jax_persistent_cache_min_compile_time_secs", SECONDS)


def _cores() -> int:
  """The number of cores that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def only_if_asked() -> None:
  """Store nothing unless a folder was named: for runs of several processes, of which only process 0 writes entries.

  The others would compile while process 0 reads, and XLA lets the processes of a run tune a program for GPUs together.
  """
  if flags.FLAGS.compilation_cache is None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_enable_compilation_cache", False)


def variables() -> dict[str, str]:
  """Environment variables for a child, which has the default folder for its own number of cores, or none."""
  return {} if jax.config.jax_enable_compilation_cache else {"JAX_ENABLE_COMPILATION_CACHE": "false"}


def _remove_parts(folder: Path):
  """Remove entries that a killed process has left incomplete; reads only those written since the last check."""
  mark, began = folder / CHECKED, time.time_ns()
  last = mark.stat().st_mtime_ns if mark.exists() else 0
  for file, status in _entries(folder):
    if status.st_mtime_ns >= last and not _is_whole(file):
      file.unlink(missing_ok=True)
  mark.touch()
  os.utime(mark, ns=(began, began))  # after the check, which may itself be interrupted


def _is_whole(file: Path) -> bool:
  try:
    return bool(zstandard.ZstdDecompressor().decompress(file.read_bytes()))
  except FileNotFoundError:  # another process has removed it
    return True
  except zstandard.ZstdError:
    return False


def _remove_oldest(folder: Path):
  left = LIMIT
  for file, status in sorted(_entries(folder), key=lambda entry: -entry[1].st_mtime_ns):
    left -= status.st_size
    if left < 0:
      file.unlink(missing_ok=True)


def _entries(folder: Path) -> list[tuple[Path, os.stat_result]]:
  found = []
  for file in folder.glob(ENTRIES):
    with contextlib.suppress(FileNotFoundError):
      found.append((file, file.stat()))
  return found
