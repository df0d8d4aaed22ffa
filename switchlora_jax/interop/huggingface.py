"""Writes plain weights as a Hugging Face LLaMA folder, and reads such a folder.

Tensors follow PyTorch's layout: the weight of a linear layer is [out, in], the transpose of our kernel, and layers are
not stacked. Both rotate the two halves of a head for rotary positions, so nothing is permuted. A folder has one
safetensors file, or several and an index.
"""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from switchlora_jax.errors import UserError
from switchlora_jax.interop import tokenizer_json
from switchlora_jax.interop.tokenizer_json import TOKENIZER
from switchlora_jax.models.llama import EPSILON, ROPE_BASE
from switchlora_jax.runs.files import read_json_object

SIZES = {  # our name: the name in config.json
  "vocab_size": "vocab_size",
  "hidden_size": "hidden_size",
  "intermediate_size": "intermediate_size",
  "num_layers": "num_hidden_layers",
  "num_heads": "num_attention_heads",
}
FIXED = {  # constants of our model; they are also the defaults of `transformers`, so a config.json may omit them
  "hidden_act": "silu",
  "rms_norm_eps": EPSILON,
  "rope_theta": ROPE_BASE,
  "attention_bias": False,
  "mlp_bias": False,
}
NAMES = {
  "embed/embedding": "model.embed_tokens.weight",
  "blocks/attention_norm/scale": "model.layers.{}.input_layernorm.weight",
  **{f"blocks/{name}/kernel": f"model.layers.{{}}.self_attn.{name}_proj.weight" for name in "qkvo"},
  "blocks/mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
  **{f"blocks/{name}/kernel": f"model.layers.{{}}.mlp.{name}_proj.weight" for name in ("gate", "up", "down")},
  "norm/scale": "model.norm.weight",
  "head/kernel": "lm_head.weight",
}
HEAD, TIED = NAMES["head/kernel"], "tie_word_embeddings"
POSITIONS, DEFAULT_POSITIONS = "max_position_embeddings", 2048  # the default of `transformers`
WRAPPERS = {"_orig_mod.": "torch.compile", "module.": "DataParallel"}  # prefix of tensor names: who adds it
COMPUTED = "rotary_emb.inv_freq"  # a tensor in old folders that is computed rather than read
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
STORED = ("F32", "F16", "BF16")  # safetensors' names of the dtypes that can be read
SHOWN = 8  # tensor names in an error message, at most


class Folder(NamedTuple):
  """A Hugging Face LLaMA folder whose tensor names and shapes were checked; no tensor was read.

  Attributes:
    path: the folder.
    sizes: vocab_size, hidden_size, intermediate_size, num_layers, num_heads.
    seq_len: max_position_embeddings.
    files: {name of a tensor without `prefix`: the file that holds it}.
    prefix: common prefix of the names in the files, such as "_orig_mod."; usually empty.
    tokenizer: its SentencePiece model; None if it has another kind of tokenizer.
  """

  path: Path
  sizes: dict[str, int]
  seq_len: int
  files: dict[str, Path]
  prefix: str
  tokenizer: Path | None


def is_folder(path: Path) -> bool:
  """Whether a directory holds a Hugging Face model, LLaMA or not: its config.json has a `model_type`."""
  return (path / "config.json").exists() and "model_type" in read_json_object(path / "config.json")


# --- write --------------------------------------------------------------------------------------------------------


def write_folder(folder: Path, sizes: dict[str, int], weights: dict, seq_len: int, tokenizer: Path) -> list[str]:
  """Writes a model in float32 and its tokenizer to an existing folder; the same model gives the same bytes.

  Args:
    folder: to write to.
    sizes: as in `Folder`.
    weights: plain weights.
    seq_len: max_position_embeddings.
    tokenizer: a SentencePiece model.
  Returns:
    One sentence per difference between SentencePiece and the converted tokenizer; see `tokenizer_json.convert`.
  """
  (folder / TOKENIZER).write_bytes(tokenizer.read_bytes())
  converted, remarks = tokenizer_json.convert(tokenizer, seq_len)
  special = tokenizer_json.special_ids(tokenizer)
  contents = {"config.json": config(sizes, seq_len) | special, "generation_config.json": special} | converted
  for name, content in contents.items():
    indent = None if name == "tokenizer.json" else 2
    (folder / name).write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n")
  save_file(tensors(weights), folder / SINGLE, metadata={"format": "pt"})
  shutil.copymode(folder / "config.json", folder / SINGLE)  # safetensors makes it readable by its owner alone
  return remarks


def config(sizes: dict[str, int], seq_len: int) -> dict:
  """The contents of config.json, without the ids of special tokens."""
  return {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    **{theirs: int(sizes[ours]) for ours, theirs in SIZES.items()},
    "num_key_value_heads": int(sizes["num_heads"]),
    "head_dim": sizes["hidden_size"] // sizes["num_heads"],
    POSITIONS: seq_len,
    **FIXED,
    TIED: False,
    "torch_dtype": "float32",
  }


def tensors(weights: dict) -> dict[str, np.ndarray]:
  """{Hugging Face name: float32 array} of plain weights."""
  named = {}
  for path, array in flatten_dict(weights, sep="/").items():
    for number, layer in enumerate(_layers(path, array)):
      layer = layer.T if path.endswith("kernel") else layer
      named[NAMES[path].format(number)] = np.ascontiguousarray(layer, np.float32)
  return named


# --- read ---------------------------------------------------------------------------------------------------------


def inspect_folder(path: Path) -> Folder:
  """Checks the config.json of a folder and the names and shapes of its tensors; reads no tensor.

  Raises:
    UserError: it holds another kind of model, a LLaMA with features that ours lacks, or tensors that do not match its
      config.json.
  """
  config = read_json_object(path / "config.json")
  if config.get(POSITIONS) is None:
    config[POSITIONS] = DEFAULT_POSITIONS
  sizes = _sizes(path, config)
  _check_kind(path, config)
  prefix, tensors = _without_wrappers(path, _find_tensors(path))
  found = {name: tensor for name, tensor in tensors.items() if not name.endswith(COMPUTED)}
  expected = _expected_shapes(sizes)
  if config.get(TIED):  # the head is the embedding, which some folders store twice
    found.pop(HEAD, None)
    del expected[HEAD]
  _check_tensors(path, {name: tensor.shape for name, tensor in found.items()}, expected)
  files = {name: tensor.file for name, tensor in found.items()}
  tokenizer = path / TOKENIZER
  return Folder(path, sizes, config[POSITIONS], files, prefix, tokenizer if tokenizer.exists() else None)


def read_weights(folder: Folder) -> dict:
  """The plain weights of a folder as NumPy arrays in float32; a head tied to the embedding becomes a copy of it."""
  names = NAMES if HEAD in folder.files else NAMES | {"head/kernel": NAMES["embed/embedding"]}
  handles = {file: _open_tensors(file) for file in set(folder.files.values())}
  weights = {}
  for path, shape in flatten_dict(shapes(folder.sizes), sep="/").items():
    weights[path] = np.empty(shape.shape, shape.dtype)
    for number, layer in enumerate(_layers(path, weights[path])):
      name = names[path].format(number)
      array = handles[folder.files[name]].get_tensor(folder.prefix + name)
      layer[...] = array.T if path.endswith("kernel") else array
  return unflatten_dict(weights, sep="/")


def shapes(sizes: dict[str, int]) -> dict:
  """The plain weights of a model of these sizes, as ShapeDtypeStructs in float32."""
  vocab, hidden, inner, layers, _ = (sizes[name] for name in SIZES)
  found = {"embed/embedding": (vocab, hidden), "norm/scale": (hidden,), "head/kernel": (hidden, vocab)}
  found |= {f"blocks/{name}_norm/scale": (layers, hidden) for name in ("attention", "mlp")}
  found |= {f"blocks/{name}/kernel": (layers, hidden, hidden) for name in "qkvo"}
  found |= {f"blocks/{name}/kernel": (layers, hidden, inner) for name in ("gate", "up")}
  found["blocks/down/kernel"] = (layers, inner, hidden)
  return unflatten_dict({path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in found.items()}, sep="/")


def _expected_shapes(sizes) -> dict[str, tuple[int, ...]]:
  """{Hugging Face name: shape} of the tensors of a model."""
  expected = {}
  for path, leaf in flatten_dict(shapes(sizes), sep="/").items():
    stacked = path.startswith("blocks/")
    shape = leaf.shape[1:] if stacked else leaf.shape
    shape = shape[::-1] if path.endswith("kernel") else shape
    expected |= {NAMES[path].format(number): shape for number in range(sizes["num_layers"] if stacked else 1)}
  return expected


def _layers(path: str, array):
  """The arrays that Hugging Face stores separately: one per layer if ours is stacked, else the array itself."""
  return array if path.startswith("blocks/") else array[None]


def _sizes(path: Path, config: dict) -> dict[str, int]:
  if config.get("model_type") != "llama":
    raise UserError(
      f"{path} must hold a LLaMA (model_type 'llama'); its config.json has model_type {config.get('model_type')!r}"
    )
  keys = (*SIZES.values(), POSITIONS)
  if missing := [key for key in keys if not (isinstance(config.get(key), int) and config[key] > 0)]:
    raise UserError(f"{path / 'config.json'} must give {', '.join(missing)} as positive integers; it does not")
  return {ours: config[theirs] for ours, theirs in SIZES.items()}


def _check_kind(path: Path, config: dict):
  """Raises `UserError` with each key that asks for a feature that our model lacks."""
  rotary = (config.get("rope_scaling") or {}) | (config.get("rope_parameters") or {})  # the older and the newer key
  heads = config["num_attention_heads"]
  expected = FIXED | {"num_key_value_heads": heads, "head_dim": config["hidden_size"] // heads, "rope_type": "default"}
  given = config | {"rope_type": rotary.get("type", "default")} | rotary
  found = expected | {key: value for key, value in given.items() if value is not None and key in expected}
  wrong = [f"{key} is {found[key]!r} there, {expected[key]!r} here" for key in expected if found[key] != expected[key]]
  if wrong:
    raise UserError(
      f"the model in {path} is a kind of LLaMA that cannot be read: {'; '.join(wrong)}; biases, grouped-query "
      f"attention, scaled rotary positions and other activations or constants are not supported"
    )


def _check_tensors(path: Path, found: dict, expected: dict):
  """Raises `UserError` with the names of tensors that are missing, unexpected or of another shape."""
  missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
  other = [f"{name} {found[name]} for {shape}" for name, shape in expected.items() if found.get(name, shape) != shape]
  kinds = {"missing": missing, "unexpected": extra, "of another shape": other}
  if wrong := [f"{kind}: {_some(names)}" for kind, names in kinds.items() if names]:
    raise UserError(
      f"the tensors in {path} must be those of the LLaMA that its config.json describes; {'; '.join(wrong)}"
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
