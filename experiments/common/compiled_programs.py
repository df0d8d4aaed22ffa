"""JAX's persistent cache of compiled programs: a second start of a program does not compile it again.

JAX names an entry by a checksum of the program, the version of the compiler, its flags and the devices. It writes
entries in place, so that a process that is killed may leave a part of one, which JAX would report at every later start
and never replace. `enable` removes such parts, and the oldest entries beyond a limit.
"""

import contextlib
import logging
import os
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
    f"folder of compiled programs for later starts; {NONE}: compile them at every start; default: compiled/ in "
    "data.cache_dir, if the command runs in one process",
  )


def enable(cache_dir: str) -> None:
  """Let JAX store compiled programs; does nothing if a setting or an environment variable of JAX names a folder.

  A folder that cannot be used is reported by a warning, since a run needs none.

  Args:
    cache_dir: the folder of all caches.
  """
  given = flags.FLAGS.compilation_cache
  if given == NONE:
    jax.config.update("jax_enable_compilation_cache", False)
  if given == NONE or jax.config.jax_compilation_cache_dir is not None:
    return
  folder = Path(given or Path(cache_dir) / "compiled").expanduser().absolute()
  try:
    folder.mkdir(parents=True, exist_ok=True)
    _remove_parts(folder)
    _remove_oldest(folder)
  except OSError as error:
    log.warning("no compiled programs are stored in %s (%s); see --compilation_cache", folder, error.strerror)
    return
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", SECONDS)


def only_if_asked() -> None:
  """Store nothing unless a folder was named: for runs of several processes, of which only process 0 writes entries.

  The others would compile while process 0 reads, and XLA lets the processes of a run tune a program for GPUs together.
  """
  if flags.FLAGS.compilation_cache is None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_enable_compilation_cache", False)


def variables() -> dict[str, str]:
  """The environment variables that give the setting of this process to a child."""
  if not jax.config.jax_enable_compilation_cache:
    return {"JAX_ENABLE_COMPILATION_CACHE": "false"}
  folder = jax.config.jax_compilation_cache_dir
  seconds = str(jax.config.jax_persistent_cache_min_compile_time_secs)
  return {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": seconds} if folder else {}


def _remove_parts(folder: Path):
  """Remove entries that a killed process has left incomplete; reads only those written since the last check."""
  mark = folder / CHECKED
  last = mark.stat().st_mtime_ns if mark.exists() else 0
  mark.touch()
  for file, status in _entries(folder):
    if status.st_mtime_ns >= last and not _is_whole(file):
      file.unlink(missing_ok=True)


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
