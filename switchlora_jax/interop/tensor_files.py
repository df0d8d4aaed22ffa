"""Named tensors in one safetensors file, or in several behind an index; and their mistakes as sentences."""

import json
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from switchlora_jax.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
STORED = ("F32", "F16", "BF16")
SHOWN = 8  # names in a sentence, at most


class Tensor(NamedTuple):
  """Where a tensor lies, and its shape."""

  file: Path
  shape: tuple[int, ...]


def find(folder: Path) -> dict[str, Tensor]:
  """{name: tensor} of all that the one file of a folder has, or the several that its index names.

  Raises:
    UserError: a file is missing or damaged, or a tensor is stored in another way than as a float of 16 or 32 bits.
  """
  found = {}
  for path in _files(folder):
    with opened(path) as file:
      for name in file.keys():  # noqa: SIM118, it is no dict
        part = file.get_slice(name)
        if part.get_dtype() not in STORED:
          raise UserError(f"{name} in {path} must be stored as {', '.join(STORED)}; it is {part.get_dtype()}")
        found[name] = Tensor(path, tuple(part.get_shape()))
  return found


def _files(folder: Path) -> list[Path]:
  if (folder / SINGLE).exists():
    return [folder / SINGLE]
  if not (folder / INDEX).exists():
    raise UserError(
      f"{folder} must hold {SINGLE} or {INDEX}, and neither is there; save the model with safe_serialization=True"
    )
  try:
    names = sorted(set(read_json(folder / INDEX)["weight_map"].values()))
  except (KeyError, AttributeError) as error:
    raise UserError(f"{folder / INDEX} must have a weight_map, from tensors to files; download it again") from error
  if missing := [name for name in names if not (folder / name).exists()]:
    raise UserError(f"{folder} must hold all files that its {INDEX} names; download {some(missing)} again")
  return [folder / name for name in names]


def opened(path: Path):
  """A safetensors file as a context, `get_tensor(name)` being a NumPy array."""
  try:
    return safe_open(path, "np")
  except (SafetensorError, OSError) as error:
    raise UserError(f"{path} must be a safetensors file; it cannot be read ({error}); download it again") from error


def read_json(path: Path) -> dict:
  """The JSON object in a file."""
  try:
    contents = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise UserError(f"{path} must be a JSON file; it cannot be read ({error}); write or download it again") from error
  if not isinstance(contents, dict):
    raise UserError(f"{path} must hold a JSON object; write or download it again")
  return contents


def some(names: list[str]) -> str:
  """The first of many names, for a sentence."""
  more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
  return ", ".join(names[:SHOWN]) + more
