"""JAX's persistent cache of compiled programs: one for a test session, whose entries are kept for the next one.

The workers of a session, and the processes that tests start, share `FOLDER`. It is the session's own, because a process
that a test kills may leave half an entry there; whole entries are kept. The name of an entry is a checksum of the
program, of the compiler's version and of its flags, so that code which changes a program is compiled anew.
"""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

import zstandard

KEPT = Path(__file__).resolve().parents[2] / ".pytest_cache" / "compiled"
LIMIT = 1 << 30  # bytes of kept entries
ENTRIES = "*-cache"

_VARIABLE = "TESTS_COMPILATION_CACHE"
_session = None  # removed at exit; None in workers
if _VARIABLE not in os.environ:
  _session = tempfile.TemporaryDirectory(prefix="compiled-")
  os.environ[_VARIABLE] = _session.name
  for file in KEPT.glob(ENTRIES):
    with contextlib.suppress(OSError):  # it is compiled again
      shutil.copy2(file, _session.name)

FOLDER = os.environ[_VARIABLE]


def keep():
  """Keep what the session has compiled. Beyond `LIMIT` bytes, what was kept first is deleted. No-op in workers."""
  if _session is None:
    return
  try:
    KEPT.mkdir(parents=True, exist_ok=True)
    for file in Path(FOLDER).glob(ENTRIES):
      if not (KEPT / file.name).exists() and _is_whole(file):
        partial = KEPT / f"{Path(FOLDER).name}.partial"
        shutil.copy2(file, partial)
        partial.replace(KEPT / file.name)
    _evict()
  except OSError as error:  # a full disk, a folder that is not ours, or another session that evicts
    print(f"compiled programs are not kept for the next session: {error}")


def _evict():
  left = LIMIT
  for path, status in sorted(((path, path.stat()) for path in KEPT.iterdir()), key=lambda at: -at[1].st_mtime):
    left -= status.st_size
    if left < 0:
      path.unlink(missing_ok=True)


def _is_whole(file: Path) -> bool:
  """Whether JAX has finished writing the entry, which it compresses with Zstandard."""
  try:
    return bool(zstandard.ZstdDecompressor().decompress(file.read_bytes()))
  except zstandard.ZstdError:
    return False
