"""Writes plain weights as a Hugging Face folder, and reads such a folder; see `families` for the models.

Tensors follow PyTorch's layout: the weight of a linear layer is [out, in], the transpose of our kernel, and layers are
not stacked. Both rotate the two halves of a head for rotary positions, so nothing is permuted. A folder has one
safetensors file, or several and an index.
"""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from switchlora_jax.errors import UserError
from switchlora_jax.interop import tokenizer_json
from switchlora_jax.interop.families import hugging_face_config, model_keys
from switchlora_jax.models import architecture_of
from switchlora_jax.runs.files import read_json_object
from switchlora_jax.runs.tokenizer_files import FAST, KEPT, SENTENCEPIECE, keep_tokenizer, tokenizer_in

NAMES = {
  "embed/embedding": "model.embed_tokens.weight",
  "blocks/attention_norm/scale": "model.layers.{}.input_layernorm.weight",
  **{f"blocks/{name}/kernel": f"model.layers.{{}}.self_attn.{name}_proj.weight" for name in "qkvo"},
  **{f"blocks/{name}_bias/bias": f"model.layers.{{}}.self_attn.{name}_proj.bias" for name in "qkv"},
  **{f"blocks/{name}_norm/scale": f"model.layers.{{}}.self_attn.{name}_norm.weight" for name in "qk"},
  "blocks/mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
  **{f"blocks/{name}/kernel": f"model.layers.{{}}.mlp.{name}_proj.weight" for name in ("gate", "up", "down")},
  "norm/scale": "model.norm.weight",
  "head/kernel": "lm_head.weight",
}
HEAD = NAMES["head/kernel"]
WRAPPERS = {"_orig_mod.": "torch.compile", "module.": "DataParallel"}  # prefix of tensor names: who adds it
COMPUTED = "rotary_emb.inv_freq"  # a tensor in old folders that is computed rather than read
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DESCRIPTION = ("config.json", *KEPT)  # names of the files that describe a model, to download from the hub
FILES = (*DESCRIPTION, SINGLE, INDEX, "model-*.safetensors")  # the same with the weights
STORED = ("F32", "F16", "BF16")  # safetensors' names of the dtypes that can be read
SHOWN = 8  # tensor names in an error message, at most


class Folder(NamedTuple):
  """A Hugging Face folder that was inspected; no tensor was read.

  Attributes:
    path: the folder.
    architecture: the keys of `config.model`.
    files: {name of a tensor without `prefix`: the file that holds it}; empty if the tensors were not inspected.
    prefix: common prefix of the names in the files, such as "_orig_mod."; usually empty.
    tokenizer: its tokenizer.model, or else its tokenizer.json; None if it has neither.
  """

  path: Path
  architecture: dict
  files: dict[str, Path]
  prefix: str
  tokenizer: Path | None


def is_folder(path: Path) -> bool:
  """Whether a directory holds a Hugging Face model of any kind: its config.json has a `model_type`."""
  return (path / "config.json").exists() and "model_type" in read_json_object(path / "config.json")


# --- write --------------------------------------------------------------------------------------------------------


def write_folder(folder: Path, architecture: dict, weights: dict, tokenizer: Path, dtype: str = "float32") -> list[str]:
  """Writes a model and its tokenizer to an existing folder; the same model gives the same bytes.

  Args:
    folder: to write to.
    architecture: the keys of `config.model`, with `max_position`.
    weights: plain weights.
    tokenizer: a SentencePiece model, which is also converted, or a tokenizer.json, which is copied with the files
      beside it.
    dtype: of the tensors, float32 or bfloat16.
  Returns:
    One sentence per difference between the tokenizer of the folder and that of training; see `tokenizer_json.convert`.
  """
  config = hugging_face_config(architecture)
  converted, remarks = tokenizer_json.convert(tokenizer, architecture["max_position"])
  kept = keep_tokenizer(tokenizer, folder)
  remarks = [] if {SENTENCEPIECE, FAST} <= kept else remarks  # the folder has another conversion than ours
  special = tokenizer_json.special_ids(tokenizer)
  contents = {"config.json": config | {"torch_dtype": dtype} | special, "generation_config.json": special} | converted
  for name in contents.keys() - kept:
    indent = None if name == FAST else 2
    (folder / name).write_text(json.dumps(contents[name], indent=indent, ensure_ascii=False) + "\n")
  save_file(tensors(weights, dtype), folder / SINGLE, metadata={"format": "pt"})
  shutil.copymode(folder / "config.json", folder / SINGLE)  # safetensors makes it readable by its owner alone
  return remarks


def tensors(weights: dict, dtype: str = "float32") -> dict[str, np.ndarray]:
  """{Hugging Face name: array} of plain weights, in float32 or bfloat16."""
  named = {}
  for path, array in flatten_dict(weights, sep="/").items():
    for number, layer in enumerate(_layers(path, array)):
      layer = layer.T if path.endswith("kernel") else layer
      named[NAMES[path].format(number)] = np.ascontiguousarray(layer, jnp.dtype(dtype))
  return named


# --- read ---------------------------------------------------------------------------------------------------------


def inspect_folder(path: Path, tensors: bool = True) -> Folder:
  """Checks the config.json of a folder and the names and shapes of its tensors; reads no tensor.

  Args:
    path: the folder.
    tensors: False if the files of the tensors are not there yet.
  Raises:
    UserError: it holds a model that `families` does not know, or tensors that do not match its config.json.
  """
  architecture = model_keys(path, read_json_object(path / "config.json"))
  files, prefix = _inspect_tensors(path, architecture) if tensors else ({}, "")
  tokenizer = tokenizer_in(path)
  return Folder(path, architecture, files, prefix, tokenizer if tokenizer.exists() else None)


def _inspect_tensors(path: Path, architecture: dict) -> tuple[dict[str, Path], str]:
  """`Folder.files` and `Folder.prefix` of a folder."""
  prefix, tensors = _without_wrappers(path, _find_tensors(path))
  found = {name: tensor for name, tensor in tensors.items() if not name.endswith(COMPUTED)}
  expected = _expected_shapes(architecture)
  if architecture["tied_embeddings"]:  # some folders store the embedding twice
    found.pop(HEAD, None)
  _check_tensors(path, {name: tensor.shape for name, tensor in found.items()}, expected)
  return {name: tensor.file for name, tensor in found.items()}, prefix


def read_weights(folder: Folder) -> dict:
  """The plain weights of a folder as NumPy arrays in float32; without a head if it is tied to the embedding."""
  handles = {file: _open_tensors(file) for file in set(folder.files.values())}
  weights = {}
  for path, shape in architecture_of(folder.architecture).plain_shapes().items():
    weights[path] = np.empty(shape, np.float32)
    for number, layer in enumerate(_layers(path, weights[path])):
      name = NAMES[path].format(number)
      array = handles[folder.files[name]].get_tensor(folder.prefix + name)
      layer[...] = array.T if path.endswith("kernel") else array
  return unflatten_dict(weights, sep="/")


def _expected_shapes(architecture: dict) -> dict[str, tuple[int, ...]]:
  """{Hugging Face name: shape} of the tensors of a model."""
  expected = {}
  for path, shape in architecture_of(architecture).plain_shapes().items():
    stacked = path.startswith("blocks/")
    shape = shape[1:] if stacked else shape
    shape = shape[::-1] if path.endswith("kernel") else shape
    expected |= {NAMES[path].format(number): shape for number in range(architecture["num_layers"] if stacked else 1)}
  return expected


def _layers(path: str, array):
  """The arrays that Hugging Face stores separately: one per layer if ours is stacked, else the array itself."""
  return array if path.startswith("blocks/") else array[None]


def _check_tensors(path: Path, found: dict, expected: dict):
  """Raises `UserError` with the names of tensors that are missing, unexpected or of another shape."""
  missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
  other = [f"{name} {found[name]} for {shape}" for name, shape in expected.items() if found.get(name, shape) != shape]
  kinds = {"missing": missing, "unexpected": extra, "of another shape": other}
  if wrong := [f"{kind}: {_some(names)}" for kind, names in kinds.items() if names]:
    raise UserError(
      f"the tensors in {path} must be those of the model that its config.json describes; {'; '.join(wrong)}"
    )


class _Tensor(NamedTuple):
  """The file that holds a tensor, and its shape."""

  file: Path
  shape: tuple[int, ...]


def _find_tensors(folder: Path) -> dict[str, _Tensor]:
  """{name: tensor} of all safetensors files of a folder.

  Raises:
    UserError: a file is missing or damaged, or a tensor is not stored as a float of 16 or 32 bits.
  """
  found = {}
  for path in _tensor_files(folder):
    with _open_tensors(path) as file:
      for name in file.keys():  # noqa: SIM118, not a dict
        part = file.get_slice(name)
        if part.get_dtype() not in STORED:
          raise UserError(f"{name} in {path} must be stored as {', '.join(STORED)}; it is {part.get_dtype()}")
        found[name] = _Tensor(path, tuple(part.get_shape()))
  return found


def _without_wrappers(folder: Path, tensors: dict[str, _Tensor]) -> tuple[str, dict[str, _Tensor]]:
  """Removes the prefixes of `WRAPPERS` from tensor names; several wrappers give several prefixes.

  Returns:
    The joined prefixes, and the tensors under their names without them.
  Raises:
    UserError: only some of the names have a prefix.
  """
  prefix = ""
  while wrapper := next((w for w in WRAPPERS if any(name.startswith(w) for name in tensors)), None):
    if others := [prefix + name for name in tensors if not name.startswith(wrapper)]:
      wrapped = len(tensors) - len(others)
      raise UserError(
        f"either all tensor names in {folder} must begin with {prefix + wrapper!r}, a prefix of {WRAPPERS[wrapper]}, "
        f"or none; {wrapped} of {len(tensors)} do; these do not: {_some(sorted(others))}; save the state_dict of the "
        f"model that {WRAPPERS[wrapper]} wraps"
      )
    prefix, tensors = prefix + wrapper, {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
  return prefix, tensors


def _tensor_files(folder: Path) -> list[Path]:
  if (folder / SINGLE).exists():
    return [folder / SINGLE]
  if not (folder / INDEX).exists():
    raise UserError(
      f"{folder} must hold {SINGLE} or {INDEX}, and neither is there; save the model with safe_serialization=True"
    )
  try:
    names = sorted(set(read_json_object(folder / INDEX)["weight_map"].values()))
  except (KeyError, AttributeError) as error:
    raise UserError(f"{folder / INDEX} must have a weight_map, from tensors to files; download it again") from error
  if missing := [name for name in names if not (folder / name).exists()]:
    raise UserError(f"{folder} must hold all files that its {INDEX} names; download {_some(missing)} again")
  return [folder / name for name in names]


def _open_tensors(path: Path):
  """A safetensors file as a context manager; its `get_tensor(name)` returns a NumPy array."""
  try:
    return safe_open(path, "np")
  except (SafetensorError, OSError) as error:
    raise UserError(f"{path} must be a safetensors file; it cannot be read ({error}); download it again") from error


def _some(names: list[str]) -> str:
  """The first `SHOWN` names, for an error message."""
  more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
  return ", ".join(names[:SHOWN]) + more
