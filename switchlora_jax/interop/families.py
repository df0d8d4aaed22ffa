"""Hugging Face's config.json ↔ `config.model`, for each family of decoders.

A family is a `model_type` whose function our decoder computes exactly. Settings that the decoder lacks are refused by
name. A sliding window is read as the largest number of positions: within it, attention is full.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from switchlora_jax.errors import UserError
from switchlora_jax.models.architecture import Architecture, architecture_of, check_architecture
from switchlora_jax.models.rotary import Rope, extends, fixed_base

SIZES = {  # our key: theirs, which every config.json must have
  "vocab_size": "vocab_size",
  "hidden_size": "hidden_size",
  "intermediate_size": "intermediate_size",
  "num_layers": "num_hidden_layers",
  "num_heads": "num_attention_heads",
}
KV_HEADS, POSITIONS, TIED = "num_key_value_heads", "max_position_embeddings", "tie_word_embeddings"
HEAD_DIM, EPSILON, WINDOW = "head_dim", "rms_norm_eps", "sliding_window"


class Family(NamedTuple):
  """A `model_type`.

  Attributes:
    name: its class in `transformers` without `ForCausalLM`.
    defaults: of `transformers`, for keys that a config.json may omit; None: derived from other keys.
    written: keys of an exported config.json that only this family has.
    qkv_bias, qk_norm: the keys of `config.model` that its code fixes.
  """

  name: str
  defaults: dict[str, Any]
  written: dict[str, Any]
  qkv_bias: bool = False
  qk_norm: bool = False


NO_BIAS, NO_WINDOW = {"attention_bias": False}, {"use_sliding_window": False}
FAMILIES = {
  "llama": Family("Llama", {POSITIONS: 2048, KV_HEADS: None, HEAD_DIM: None}, NO_BIAS | {"mlp_bias": False}),
  "mistral": Family("Mistral", {POSITIONS: 131_072, KV_HEADS: 8, HEAD_DIM: None, WINDOW: 4096}, {WINDOW: None}),
  "qwen2": Family("Qwen2", {POSITIONS: 32_768, KV_HEADS: 32, HEAD_DIM: None, WINDOW: 4096}, NO_WINDOW, qkv_bias=True),
  "qwen3": Family(
    "Qwen3", {POSITIONS: 32_768, KV_HEADS: 32, HEAD_DIM: 128, WINDOW: 4096}, NO_BIAS | NO_WINDOW, qk_norm=True
  ),
}
ALL = {EPSILON: 1e-6, TIED: False, "rope_theta": 10_000.0}  # further defaults of every family
FIXED = {  # settings that the decoder has no other value of, which are also the defaults of every family
  "hidden_act": "silu",
  "attention_bias": False,
  "mlp_bias": False,
  "partial_rotary_factor": 1.0,
  "quantization_config": None,
}
MISSING = {  # other model types: what the decoder would need
  "gemma": "scaled embeddings and norms with 1 + scale",
  "gemma2": "soft-capped scores and norms after each part of a block",
  "gemma3_text": "local attention and norms after each part of a block",
  "gpt2": "learned positions, LayerNorm and biases",
  "gpt_neox": "parallel attention and MLP, LayerNorm and partly rotated heads",
  "granite": "multipliers of embeddings, scores, residuals and logits",
  "mixtral": "a mixture of experts",
  "olmo2": "norms after each part of a block",
  "phi3": "tensors that join q, k and v, and gate and up",
  "qwen2_moe": "a mixture of experts",
  "qwen3_moe": "a mixture of experts",
  "smollm3": "layers without rotary positions",
}
ROPE = {  # of a scaling: {our key: theirs}
  "linear": {"factor": "factor"},
  "dynamic": {"factor": "factor"},
  "llama3": {
    "factor": "factor",
    "original_length": "original_max_position_embeddings",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
  },
  "yarn": {
    "factor": "factor",
    "original_length": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
  },
}
OPTIONAL = ("original_length", "beta_fast", "beta_slow", "attention_factor")  # keys of a scaling that may be missing
ORIGINAL = "original_max_position_embeddings"
# Keys of a scaling that change nothing in `transformers`, with these values; None: with any.
UNUSED: dict[str, dict[str, Any]] = {
  "linear": {ORIGINAL: None},
  "dynamic": {ORIGINAL: None},
  "llama3": {},
  "yarn": {"truncate": True, "finetuned": None},
}


# --- read ---------------------------------------------------------------------------------------------------------


def model_keys(path: Path, config: Mapping) -> dict:
  """The keys of `config.model` for a config.json.

  Args:
    path: its folder, for messages.
    config: its contents.
  Raises:
    UserError: it is another kind of model, lacks a size, or has settings that the decoder lacks.
  """
  kind = str(config.get("model_type"))
  if kind not in FAMILIES:
    needed = f", which needs {MISSING[kind]}" if kind in MISSING else ""
    raise UserError(
      f"{path} must hold a model of model_type {', '.join(FAMILIES)}; its config.json has {kind!r}{needed}; start "
      f"from another model"
    )
  family = FAMILIES[kind]
  given = {key: value for key, value in config.items() if value is not None}
  full = FIXED | ALL | family.defaults | ({KV_HEADS: None} if KV_HEADS in config else {}) | given
  sizes = (*SIZES.values(), POSITIONS, *(key for key in (KV_HEADS, HEAD_DIM) if full[key] is not None))
  if missing := [key for key in sizes if not (_is_integer(full.get(key)) and full[key] > 0)]:
    raise UserError(f"{path / 'config.json'} must give {', '.join(missing)} as positive integers; it does not")
  wrong = [f"{key} is {full[key]!r}, not {value!r}" for key, value in FIXED.items() if full[key] != value]
  if wrong:
    raise UserError(
      f"the model in {path} has settings that are not supported: {'; '.join(wrong)}; start from another model"
    )
  keys = {
    **{ours: full[theirs] for ours, theirs in SIZES.items()},
    "num_kv_heads": full[KV_HEADS],
    "head_dim": full[HEAD_DIM],
    "max_position": _positions(path, config, full),
    "norm_eps": _number(path, EPSILON, full[EPSILON]),
    "tied_embeddings": _flag(path, TIED, full[TIED]),
    "qkv_bias": family.qkv_bias,
    "qk_norm": family.qk_norm,
    "rope": _rope(path, full)._asdict(),
  }
  try:
    check_architecture(keys)
  except UserError as error:
    raise UserError(f"{path / 'config.json'} describes no model: {error}") from error
  return architecture_of(keys)._asdict() | {"rope": keys["rope"]}


def _is_integer(value) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _number(path: Path, key: str, value) -> float:
  if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
    raise UserError(f"{key} (={value!r}) in {path / 'config.json'} must be a number; correct it")
  return float(value)


def _flag(path: Path, key: str, value) -> bool:
  if not isinstance(value, bool):
    raise UserError(f"{key} (={value!r}) in {path / 'config.json'} must be true or false; correct it")
  return value


def _positions(path: Path, config: Mapping, full: Mapping) -> int:
  """The number of positions within which attention is full."""
  window = config[WINDOW] if WINDOW in config else full.get(WINDOW)  # null there means none
  if not window or not full.get("use_sliding_window", full["model_type"] == "mistral"):
    return full[POSITIONS]
  return int(min(full[POSITIONS], _number(path, WINDOW, window)))


def _rope(path: Path, full: Mapping) -> Rope:
  """The rotary positions; `rope_parameters` is the newer key for `rope_scaling` and `rope_theta`."""
  found: dict[str, Any] = {}
  for key in ("rope_scaling", "rope_parameters"):
    if not isinstance(full.get(key, {}), Mapping):
      raise UserError(f"{key} (={full[key]!r}) in {path / 'config.json'} must be an object; correct it")
    found |= full.get(key, {})
  base = _number(path, "rope_theta", found.pop("rope_theta", full["rope_theta"]))
  older = found.pop("type", "default")
  kind = found.pop("rope_type", older)
  if kind not in ("default", *ROPE):
    raise UserError(
      f"the rotary positions of the model in {path} must be scaled by default, {', '.join(ROPE)}; its config.json has "
      f"{kind!r}; start from another model"
    )
  names, unused = ROPE.get(kind, {}), dict(UNUSED.get(kind, {}))
  found = {key: value for key, value in found.items() if value is not None}
  if kind == "yarn" and not (found.get("mscale") and found.get("mscale_all_dim")):
    unused |= {"mscale": None, "mscale_all_dim": None}
  harmless = {key for key in found.keys() & unused.keys() if unused[key] in (None, found[key])}
  if extra := {key: value for key, value in found.items() if key not in {*names.values(), *harmless}}:
    raise UserError(
      f"the rotary positions of the model in {path} have settings that are not supported with {kind}: {extra}; start "
      f"from another model"
    )
  if missing := [theirs for ours, theirs in names.items() if theirs not in found and ours not in OPTIONAL]:
    raise UserError(
      f"{path / 'config.json'} must give {', '.join(missing)} of its rotary positions ({kind}); add what the model was "
      f"trained with"
    )
  keys: dict[str, Any] = {
    ours: _number(path, theirs, found[theirs])
    for ours, theirs in names.items()
    if found.get(theirs) or (theirs in found and ours not in OPTIONAL)  # 0 is the default of an optional key
  }
  if kind in ("llama3", "yarn") and full.get(ORIGINAL):  # beside the scaling, it comes first in `transformers`
    keys["original_length"] = _number(path, ORIGINAL, full[ORIGINAL])
  if kind not in ("default", "linear"):
    keys["original_length"] = int(keys.get("original_length", full[POSITIONS]))
  return Rope(base, "none" if kind == "default" else kind, **keys)


# --- write --------------------------------------------------------------------------------------------------------


def hugging_face_config(keys: Mapping) -> dict:
  """The contents of config.json for keys of `config.model`, without dtype and the ids of special tokens.

  Without `qkv_bias` and `qk_norm`, the family is LLaMA, or Mistral if the number of heads does not divide the hidden
  size, which `transformers` refuses for LLaMA; both compute the same function.

  Raises:
    UserError: no family has this combination of settings.
  """
  model = architecture_of(keys)
  kind = _family_of(model)
  positions = model.max_position
  if model.rope.scaling == "dynamic":
    if extends(model.rope, positions):  # `transformers` would compute the base for the length of each sequence
      model = model._replace(rope=Rope(fixed_base(model.rope, model.head_dim, positions)))
    else:
      positions = model.rope.original_length  # beyond which `transformers` scales
  return {
    "architectures": [f"{FAMILIES[kind].name}ForCausalLM"],
    "model_type": kind,
    **{theirs: int(getattr(model, ours)) for ours, theirs in SIZES.items()},
    KV_HEADS: model.num_kv_heads,
    HEAD_DIM: model.head_dim,
    POSITIONS: positions,
    EPSILON: model.norm_eps,
    TIED: model.tied_embeddings,
    "rope_theta": model.rope.base,
    **_rope_scaling(model.rope),
    "hidden_act": FIXED["hidden_act"],
    **FAMILIES[kind].written,
  }


def _family_of(model: Architecture) -> str:
  for kind, family in FAMILIES.items():
    if kind == "llama" and model.hidden_size % model.num_heads:
      continue
    if (family.qkv_bias, family.qk_norm) == (model.qkv_bias, model.qk_norm):
      return kind
  raise UserError(
    "no Hugging Face model has model.qkv_bias as well as model.qk_norm; a run with both cannot be exported"
  )


def _rope_scaling(rope: Rope) -> dict:
  if rope.scaling == "none":
    return {}
  names = ROPE[rope.scaling].items()
  found = {theirs: getattr(rope, ours) for ours, theirs in names if getattr(rope, ours) is not None}
  return {"rope_scaling": {"rope_type": rope.scaling, **found}}
