"""Plain weights as a Hugging Face LLaMA folder, and such a folder as plain weights.

Their tensors are PyTorch's: the weight of a linear layer is [out, in], our kernel transposed, and layers are not
stacked. Their rotary positions turn the two halves of a head, as ours do, so nothing is permuted.
"""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from switchlora_jax.errors import UserError
from switchlora_jax.interop import tensor_files, tokenizer_json
from switchlora_jax.interop.tokenizer_json import TOKENIZER
from switchlora_jax.models.llama import EPSILON, ROPE_BASE

SIZES = {  # ours: theirs
  "vocab_size": "vocab_size",
  "hidden_size": "hidden_size",
  "intermediate_size": "intermediate_size",
  "num_layers": "num_hidden_layers",
  "num_heads": "num_attention_heads",
}
FIXED = {  # what our model is, in their words; their defaults, too: a config.json may leave them out
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
COMPUTED = "rotary_emb.inv_freq"  # a tensor that old folders keep and nothing needs


class Folder(NamedTuple):
  """What a Hugging Face LLaMA folder says, its tensors checked but not read.

  Attributes:
    path: of the folder.
    sizes: vocab_size, hidden_size, intermediate_size, num_layers, num_heads.
    seq_len: max_position_embeddings.
    files: {tensor: the file that has it}.
    tokenizer: its SentencePiece model; None where it has another kind of tokenizer.
  """

  path: Path
  sizes: dict[str, int]
  seq_len: int
  files: dict[str, Path]
  tokenizer: Path | None


def is_folder(path: Path) -> bool:
  """Whether the directory is of a Hugging Face model, LLaMA or not: its config.json says which."""
  return (path / "config.json").exists() and "model_type" in tensor_files.read_json(path / "config.json")


# --- there --------------------------------------------------------------------------------------------------------


def write(folder: Path, sizes: dict[str, int], weights: dict, seq_len: int, tokenizer: Path) -> list[str]:
  """Fill a folder with the model in float32 and its tokenizer; the same model gives the same bytes.

  Returns:
    What of the tokenizer `transformers` will not do as SentencePiece does, a sentence each.
  """
  (folder / TOKENIZER).write_bytes(tokenizer.read_bytes())
  converted, remarks = tokenizer_json.convert(tokenizer, seq_len)
  special = tokenizer_json.special_ids(tokenizer)
  contents = {"config.json": config(sizes, seq_len) | special, "generation_config.json": special} | converted
  for name, content in contents.items():
    indent = None if name == "tokenizer.json" else 2
    (folder / name).write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n")
  save_file(tensors(weights), folder / tensor_files.SINGLE, metadata={"format": "pt"})
  shutil.copymode(folder / "config.json", folder / tensor_files.SINGLE)  # else its owner alone could read it
  return remarks


def config(sizes: dict[str, int], seq_len: int) -> dict:
  """Of config.json, all but the ids of special tokens."""
  return {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    **{theirs: int(sizes[ours]) for ours, theirs in SIZES.items()},
    "num_key_value_heads": int(sizes["num_heads"]),
    "head_dim": sizes["hidden_size"] // sizes["num_heads"],
    "max_position_embeddings": seq_len,
    **FIXED,
    TIED: False,
    "torch_dtype": "float32",
  }


def tensors(weights: dict) -> dict[str, np.ndarray]:
  """Plain weights, each under its Hugging Face name, float32."""
  named = {}
  for path, array in flatten_dict(weights, sep="/").items():
    for number, layer in enumerate(_layers(path, array)):
      layer = layer.T if path.endswith("kernel") else layer
      named[NAMES[path].format(number)] = np.ascontiguousarray(layer, np.float32)
  return named


# --- and back -----------------------------------------------------------------------------------------------------


def inspect(path: Path) -> Folder:
  """What a folder holds, if it is a LLaMA as ours; no tensor is read.

  Raises:
    UserError: it is another model, wants what ours has not, or its tensors are not those of its config.json.
  """
  said = tensor_files.read_json(path / "config.json")
  sizes = _sizes(path, said)
  _check_kind(path, said)
  found = {name: there for name, there in tensor_files.find(path).items() if not name.endswith(COMPUTED)}
  expected = _their_shapes(sizes)
  if said.get(TIED):  # the head is the embedding, which some folders store twice
    found.pop(HEAD, None)
    del expected[HEAD]
  _check_tensors(path, {name: there.shape for name, there in found.items()}, expected)
  files = {name: there.file for name, there in found.items()}
  tokenizer = path / TOKENIZER
  return Folder(path, sizes, said["max_position_embeddings"], files, tokenizer if tokenizer.exists() else None)


def read(folder: Folder) -> dict:
  """The plain weights in a folder, NumPy arrays in float32; a head tied to the embedding becomes a copy of it."""
  names = NAMES if HEAD in folder.files else NAMES | {"head/kernel": NAMES["embed/embedding"]}
  handles = {file: tensor_files.opened(file) for file in set(folder.files.values())}
  weights = {}
  for path, like in flatten_dict(shapes(folder.sizes), sep="/").items():
    weights[path] = np.empty(like.shape, like.dtype)
    for number, layer in enumerate(_layers(path, weights[path])):
      name = names[path].format(number)
      array = handles[folder.files[name]].get_tensor(name)
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


def _their_shapes(sizes) -> dict[str, tuple[int, ...]]:
  found = {}
  for path, like in flatten_dict(shapes(sizes), sep="/").items():
    shape = like.shape[1:] if path.startswith("blocks/") else like.shape
    count = sizes["num_layers"] if path.startswith("blocks/") else 1
    shape = shape[::-1] if path.endswith("kernel") else shape
    found |= {NAMES[path].format(number): shape for number in range(count)}
  return found


def _layers(path: str, array):
  """The arrays that theirs are: each layer's, where ours are stacked."""
  return array if path.startswith("blocks/") else array[None]


def _sizes(path: Path, said: dict) -> dict[str, int]:
  if said.get("model_type") != "llama":
    raise UserError(f"{path} must hold a LLaMA (model_type 'llama'); its config.json says {said.get('model_type')!r}")
  wanted = (*SIZES.values(), "max_position_embeddings")
  if missing := [key for key in wanted if not (isinstance(said.get(key), int) and said[key] > 0)]:
    raise UserError(f"{path / 'config.json'} must say {', '.join(missing)} as positive whole numbers; it does not")
  return {ours: said[theirs] for ours, theirs in SIZES.items()}


def _check_kind(path: Path, said: dict):
  """Raise `UserError`, with each key that asks for what our model has not."""
  rotary = (said.get("rope_scaling") or {}) | (said.get("rope_parameters") or {})  # the older and the newer key
  heads = said["num_attention_heads"]
  expected = FIXED | {"num_key_value_heads": heads, "head_dim": said["hidden_size"] // heads, "rope_type": "default"}
  given = said | {"rope_type": rotary.get("type", "default")} | rotary
  found = expected | {key: value for key, value in given.items() if value is not None and key in expected}
  wrong = [f"{key} is {found[key]!r} there, {expected[key]!r} here" for key in expected if found[key] != expected[key]]
  if wrong:
    raise UserError(
      f"the model in {path} is a LLaMA of another kind than can be read: {'; '.join(wrong)}; there are no biases, no "
      f"grouped-query attention, no scaled rotary positions and no other activation or constants here"
    )


def _check_tensors(path: Path, found: dict, expected: dict):
  """Raise `UserError` with the names of tensors that are missing, too many or of another shape."""
  missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
  other = [f"{name} {found[name]} for {shape}" for name, shape in expected.items() if found.get(name, shape) != shape]
  kinds = {"missing": missing, "not of such a model": extra, "of another shape": other}
  if wrong := [f"{kind}: {tensor_files.some(names)}" for kind, names in kinds.items() if names]:
    raise UserError(
      f"the tensors in {path} must be those of the LLaMA that its config.json describes; {'; '.join(wrong)}"
    )
