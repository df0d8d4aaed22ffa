"""Files that survive a kill: atomic writes and JSON with a checksum."""

import hashlib
import json
import os
from pathlib import Path

from switchlora_jax.errors import UserError

CHECK = "sha256"  # of all else in a file of JSON


def write_bytes(path: Path, contents: bytes) -> None:
  """Write a file that is, at every moment, either the old one or the new one."""
  partial = path.with_name(f"{path.name}.partial")
  with partial.open("wb") as file:
    file.write(contents)
    file.flush()
    os.fsync(file.fileno())
  os.replace(partial, path)


def write_json(path: Path, contents: dict) -> None:
  """Write a file that is, at every moment, either the old one or the new one, and that knows if it was changed."""
  write_bytes(path, json.dumps(contents | {CHECK: _digest(contents)}, indent=1).encode())


def read_json(path: Path) -> dict | None:
  """What such a file says, or None where there is none; a UserError where it is damaged or may not be read."""
  try:
    if not path.exists():
      return None
    contents = json.loads(path.read_bytes())
    if contents.pop(CHECK) == _digest(contents):
      return contents
    found = "its checksum is another"
  except OSError as error:
    raise UserError(f"{path} must be a file that can be read; {error}; give yourself access to it") from error
  except (ValueError, AttributeError, LookupError, TypeError) as error:
    found = error
  raise UserError(f"{path} is not the JSON that was written ({found}); delete {path.parent}, and prepare it again")


def _digest(contents: dict) -> str:
  return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


def replace_text(path: Path, text: str):
  """Write a file so that it is, at every moment, either the old one or the new one."""
  write_bytes(path, text.encode())


def checksum(path: Path) -> str:
  """SHA-256 of a file, hexadecimal."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
