"""Hugging Face folders: logits of folders written by `transformers`, and the format of those we write.

The folder in tests/golden and its logits were made with `transformers`. If it is installed, some tests also run it.
"""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import GOLDEN
from safetensors.numpy import load_file, save_file
from small_model import same_bits

from switchlora_jax.errors import UserError
from switchlora_jax.interop import huggingface, pretrained
from switchlora_jax.models import architecture_of, make_model

THEIRS = GOLDEN / "huggingface"
SIZES = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, max_position=32)
HEAD, EMBED, Q1 = "lm_head.weight", "model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path):
  """A copy of the folder that `transformers` wrote."""
  return shutil.copytree(THEIRS, tmp_path / "theirs")


def change_config(folder, **changes):
  """Changes keys of config.json; None removes a key."""
  path = folder / "config.json"
  config = json.loads(path.read_text()) | changes
  path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def store(folder, change):
  """Rewrites the tensors of a folder; `change` modifies {name: array} in place."""
  tensors = load_file(folder / "model.safetensors")
  change(tensors)
  save_file(tensors, folder / "model.safetensors")


def read(folder):
  return huggingface.read_weights(huggingface.inspect_folder(folder))


def logits(weights, tokens):
  model = make_model(SIZES)
  return np.asarray(jax.jit(model.apply)({"params": weights}, jnp.asarray(tokens)))


def random_weights(sizes, seed=0):
  generator = np.random.default_rng(seed)
  shapes = architecture_of(sizes).plain_shapes()
  return unflatten_dict({path: generator.standard_normal(shape, np.float32) for path, shape in shapes.items()}, sep="/")


# --- compared with transformers -----------------------------------------------------------------------------------


def test_logits_agree_with_transformers(golden):
  """Up to the order of float32 sums: both differ from float64 by 1.3·10⁻⁵."""
  recorded, _ = golden("huggingface")
  weights = read(THEIRS)
  assert np.abs(recorded["logits"]).max() > 4
  np.testing.assert_allclose(logits(weights, recorded["tokens"]), recorded["logits"], rtol=0, atol=1e-4)
  blocks = weights["blocks"]
  for one, other in (("q", "k"), ("gate", "up"), ("attention_norm", "mlp_norm")):
    swapped = weights | {"blocks": blocks | {one: blocks[other], other: blocks[one]}}
    assert np.abs(logits(swapped, recorded["tokens"]) - recorded["logits"]).max() > 0.1, (one, other)


def test_transformers_computes_our_logits_from_a_folder_we_write(tmp_path):
  torch = pytest.importorskip("torch", reason="needs requirements-torch.txt; its recorded logits are compared anyway")
  from transformers import LlamaForCausalLM

  weights = jax.tree.map(lambda x: 0.3 * x, random_weights(SIZES))
  huggingface.write_folder(tmp_path, SIZES, weights, THEIRS / "bpe.model")
  model = LlamaForCausalLM.from_pretrained(tmp_path, dtype="auto")
  assert model.dtype == torch.float32 and model.config.bos_token_id is None and model.config.eos_token_id == 1
  assert model.generation_config.eos_token_id == 1 and model.config.max_position_embeddings == 32
  tokens = np.random.default_rng(1).integers(0, 64, (2, 32))
  with torch.no_grad():
    expected = model(torch.tensor(tokens)).logits.numpy()
  assert np.abs(expected).max() > 1
  np.testing.assert_allclose(logits(weights, tokens), expected, rtol=0, atol=1e-4)


def test_a_written_folder_matches_one_of_transformers(tmp_path):
  """The tensors are bitwise the same, and every key of our config.json agrees with theirs."""
  huggingface.write_folder(tmp_path, SIZES, read(THEIRS), THEIRS / "bpe.model")
  assert same_bits(load_file(tmp_path / "model.safetensors"), load_file(THEIRS / "model.safetensors"))
  ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, THEIRS))
  assert theirs["rope_parameters"] == {"rope_type": "default", "rope_theta": ours.pop("rope_theta")}
  assert theirs["dtype"] == ours.pop("torch_dtype")
  assert ours == {key: theirs[key] for key in ours}
  assert len(ours) == 18


# --- round trips --------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(
  st.fixed_dictionaries({"vocab_size": st.integers(1, 9), "intermediate_size": st.integers(1, 9)}),
  st.sampled_from([1, 2, 11]),
  st.sampled_from([(2, 1), (8, 2), (4, 2)]),
)
def test_writing_reading_and_writing_again_gives_the_same_files(tmp_path_factory, sizes, layers, heads):
  sizes = sizes | {"hidden_size": heads[0], "num_heads": heads[1], "num_layers": layers, "max_position": 7}
  weights, folders = random_weights(sizes), [tmp_path_factory.mktemp("folder") for _ in range(2)]
  huggingface.write_folder(folders[0], sizes, weights, THEIRS / "bpe.model")
  back = pretrained.read(pretrained.inspect(folders[0]))
  assert same_bits(back.weights, weights) and (back.architecture | sizes, back.seq_len) == (back.architecture, 7)
  assert back.tokenizer == folders[0] / "tokenizer.model"
  huggingface.write_folder(folders[1], back.architecture, back.weights, back.tokenizer)
  assert sorted(p.name for p in folders[0].iterdir()) == sorted(p.name for p in folders[1].iterdir())
  assert all(path.read_bytes() == (folders[1] / path.name).read_bytes() for path in folders[0].iterdir())


def test_float64_weights_are_written_in_float32():
  written = huggingface.tensors(jax.tree.map(lambda x: x.astype(np.float64), random_weights(SIZES)))
  assert {str(x.dtype) for x in written.values()} == {"float32"}


def shard(folder):
  """Splits the tensors of a folder into three files and an index, whose path is returned."""
  original = load_file(folder / "model.safetensors")
  (folder / "model.safetensors").unlink()
  parts = {f"model-{i}.safetensors": sorted(original)[i::3] for i in range(3)}
  for file, names in parts.items():
    save_file({name: original[name] for name in names}, folder / file)
  index = folder / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": {name: file for file, names in parts.items() for name in names}}))
  return index


def test_weights_in_several_files(folder):
  index = shard(folder)
  assert same_bits(read(folder), read(THEIRS))

  (folder / "model-1.safetensors").unlink()
  refused(folder, "must hold all files that its model.safetensors.index.json names; download model-1.safetensors again")
  index.write_text("{}")
  refused(folder, "must have a weight_map")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_weights_in_16_bits_are_widened(folder, dtype):
  store(folder, lambda tensors: tensors.update({name: x.astype(dtype) for name, x in tensors.items()}))
  expected = jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), read(THEIRS))
  assert same_bits(read(folder), expected)


@pytest.mark.parametrize("twice", [False, True], ids=["stored once", "stored twice"])
def test_a_tied_head_stays_tied(folder, twice):
  change_config(folder, tie_word_embeddings=True)
  if not twice:
    store(folder, lambda tensors: tensors.pop(HEAD))
  original = read(THEIRS)
  del original["head"]
  assert same_bits(read(folder), original)


def test_keys_and_tensors_of_old_folders_are_accepted(folder):
  """The old rotary key, missing keys with default values, and a tensor that the model computes itself."""
  change_config(
    folder, rope_parameters=None, rope_theta=10000.0, num_key_value_heads=None, head_dim=None, rms_norm_eps=None
  )
  extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
  store(folder, lambda tensors: tensors.update(extra))
  assert same_bits(read(folder), read(THEIRS))


def prefixed(folder, prefix, names=None):
  """Adds a prefix to the given tensor names of a folder, or to all."""
  original = load_file(folder / "model.safetensors")
  names = original if names is None else names
  save_file({prefix + name if name in names else name: x for name, x in original.items()}, folder / "model.safetensors")


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "_orig_mod.module.", "module._orig_mod."])
@pytest.mark.parametrize("files", ["one file", "several files"])
def test_the_prefix_of_a_wrapped_model_is_removed(folder, prefix, files):
  """`torch.compile` and `DataParallel` add one to every name."""
  prefixed(folder, prefix)
  if files == "several files":
    shard(folder)
  assert same_bits(read(folder), read(THEIRS))


@pytest.mark.parametrize(("outer", "inner"), [("", "_orig_mod."), ("", "module."), ("module.", "_orig_mod.")])
def test_a_prefix_of_some_names_is_refused(folder, outer, inner):
  """It is ambiguous which weights are those of the model."""
  prefixed(folder, inner, [HEAD, Q1])
  prefixed(folder, outer)
  wrapper = {"_orig_mod.": "torch.compile", "module.": "DataParallel"}[inner]
  refused(
    folder, f"must begin with '{outer}{inner}', a prefix of {wrapper}, or none; 2 of 21 do; these do not: {outer}"
  )
  refused(folder, f"{outer}{EMBED}, {outer}model.layers.0.")
  refused(folder, f"save the state_dict of the model that {wrapper} wraps")


def test_a_folder_without_a_maximum_length_gets_that_of_transformers(folder):
  assert huggingface.inspect_folder(folder).architecture["max_position"] == 32
  change_config(folder, max_position_embeddings=None)  # no such key
  assert huggingface.inspect_folder(folder).architecture["max_position"] == 2048
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": None}))
  assert huggingface.inspect_folder(folder).architecture["max_position"] == 2048


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_json_with_a_byte_order_mark_is_read(folder, encoding):
  """Windows editors and PowerShell write byte order marks, which `json` does not accept in text."""
  for path in (shard(folder), folder / "config.json"):
    path.write_text(path.read_text(), encoding=encoding)
    assert path.read_bytes()[:1] != b"{"
  assert huggingface.is_folder(folder) and same_bits(read(folder), read(THEIRS))


# --- mistakes -----------------------------------------------------------------------------------------------------


def refused(folder, sentence):
  with pytest.raises(UserError) as caught:
    huggingface.inspect_folder(folder)
  assert sentence in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize(
  ("key", "value", "sentence"),
  [
    ("num_key_value_heads", 1, "of another shape: model.layers.0.self_attn.k_proj.weight (16, 16) for (8, 16), "),
    ("head_dim", 16, "of another shape: model.layers.0.self_attn.q_proj.weight (16, 16) for (32, 16), "),
    ("attention_bias", True, "settings that are not supported: attention_bias is True, not False; start from"),
    ("mlp_bias", True, "mlp_bias is True, not False"),
    ("hidden_act", "gelu", "hidden_act is 'gelu', not 'silu'"),
    (
      "rope_parameters",
      {"rope_theta": 5e5, "rope_type": "llama3"},
      "must give factor, low_freq_factor, high",
    ),
    (
      "model_type",
      "gemma",
      "of model_type llama, mistral, qwen2, qwen3; its config.json has 'gemma', which",
    ),
    ("hidden_size", None, "must give hidden_size as positive integers"),
    ("max_position_embeddings", 0, "must give max_position_embeddings as positive integers"),
  ],
)
def test_another_kind_of_model_is_refused(folder, key, value, sentence):
  change_config(folder, **{key: value})
  refused(folder, sentence)


def test_other_tensors_are_refused_by_name(folder):
  def change(tensors):
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.ones(16, np.float32)
    tensors[HEAD] = tensors[HEAD].T.copy()
    del tensors[Q1]

  store(folder, change)
  refused(folder, f"missing: {Q1}; unexpected: model.layers.0.self_attn.q_proj.bias; of another shape: {HEAD} ")


def test_another_number_of_layers_is_refused(folder):
  change_config(folder, num_hidden_layers=3)
  refused(folder, "missing: model.layers.2.input_layernorm.weight, model.layers.2.mlp.down_proj.weight, ")
  refused(folder, "model.layers.2.self_attn.q_proj.weight and 1 more")
  change_config(folder, num_hidden_layers=1)
  refused(folder, "unexpected: model.layers.1.")


def test_damaged_files_are_refused(folder):
  weights = folder / "model.safetensors"
  original = weights.read_bytes()
  weights.write_bytes(original[: len(original) // 2])
  refused(folder, "must be a safetensors file; it cannot be read")
  weights.unlink()
  refused(folder, "must hold model.safetensors or model.safetensors.index.json, and neither is there")
  for text, sentence in (("{", "must be a JSON file"), ("[]", "must hold a JSON object")):
    (folder / "config.json").write_text(text)
    refused(folder, sentence)


def test_quantized_weights_are_refused(folder):
  store(folder, lambda tensors: tensors.update({HEAD: tensors[HEAD].astype(np.int8)}))
  refused(folder, f"{HEAD} in {folder / 'model.safetensors'} must be stored as F32, F16, BF16; it is I8")
