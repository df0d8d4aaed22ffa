"""Families of models: logits and greedy tokens of folders written by `transformers`, and config.json both ways.

The folders in tests/golden/families and their logits were made with `transformers`. If it is installed, some tests also
run it.
"""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paths import GOLDEN
from recorded import load
from safetensors.numpy import load_file
from small_model import same_bits
from stages import slowly

from switchlora_jax.errors import UserError
from switchlora_jax.interop import families, huggingface
from switchlora_jax.models import architecture_of, make_model
from switchlora_jax.models.generation import Sampling, generate

MODELS = GOLDEN / "families"
# The keys of each model that are not those of a LLaMA 1 with `SIZES`.
SIZES = dict(vocab_size=48, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, max_position=16)
KEYS = {
  "llama2": dict(norm_eps=1e-5),
  "llama3": dict(
    num_kv_heads=2, norm_eps=1e-5, max_position=64,
    rope=dict(base=5e5, scaling="llama3", factor=8.0, original_length=16),
  ),
  "smollm2": dict(num_kv_heads=1, tied_embeddings=True, rope=dict(base=1e5)),
  "mistral": dict(num_kv_heads=2, head_dim=8, norm_eps=1e-5, rope=dict(base=1e6)),
  "qwen2": dict(num_kv_heads=2, tied_embeddings=True, qkv_bias=True, rope=dict(base=1e6)),
  "qwen3": dict(num_kv_heads=2, head_dim=8, qk_norm=True, rope=dict(base=1e6)),
  "linear": dict(num_kv_heads=2, rope=dict(scaling="linear", factor=2.0)),
  "dynamic": dict(num_kv_heads=2, rope=dict(scaling="dynamic", factor=2.0, original_length=16)),
  "yarn": dict(
    num_kv_heads=2, qkv_bias=True, max_position=64, rope=dict(scaling="yarn", factor=4.0, original_length=16)
  ),
}  # fmt: skip
LENGTHS = (8, 16, 40)  # below, at and above the positions of the original training


@functools.cache
def recorded():
  """{"NAME/logits/LENGTH": array, …}"""
  return load("families")[0]


@functools.cache
def opened(name):
  """(keys of config.model, plain weights) of a recorded folder."""
  folder = huggingface.inspect_folder(MODELS / name)
  return folder.architecture, huggingface.read_weights(folder)


def logits(keys, weights, tokens):
  return np.asarray(jax.jit(make_model(keys).apply)({"params": weights}, jnp.asarray(tokens)))


def greedy(keys, weights, prompt, count):
  draws = dict(pieces=keys["vocab_size"], sampling=Sampling(temperature=0), seed=0, end=-1)
  return list(generate(make_model(keys), {"params": weights}, prompt, new_tokens=count, **draws))


# --- compared with transformers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KEYS)
def test_the_keys_of_a_folder(name):
  assert architecture_of(opened(name)[0]) == architecture_of(SIZES | KEYS[name])
  assert architecture_of(opened(name)[0]).rope.base == KEYS[name].get("rope", {}).get("base", 1e4)


@pytest.mark.parametrize("name", KEYS)
def test_logits_agree_with_transformers(name):
  """For lengths below, at and above that of the original training, with which scaled rotary positions change."""
  keys, weights = opened(name)
  tokens = recorded()[f"{name}/tokens"]
  for length in LENGTHS:
    expected = recorded()[f"{name}/logits/{length}"]
    assert np.abs(expected).max() > 0.2
    # `transformers` computes dynamic scaling for each length, this project for `max_position`.
    reach = max(length, 16) if name == "dynamic" else 40
    found = logits(keys | {"max_position": reach}, weights, tokens[:, :reach])[:, :length]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4, err_msg=f"{length} tokens")


@pytest.mark.parametrize("name", slowly(KEYS, quick=["qwen3", "yarn"]))
def test_greedy_tokens_agree_with_transformers(name):
  """With a cache of keys and values, for grouped heads, normalised heads, biases and scaled positions."""
  keys, weights = opened(name)
  expected = recorded()[f"{name}/generated"].tolist()
  assert greedy(keys, weights, recorded()[f"{name}/tokens"][0, :6].tolist(), len(expected)) == expected
  assert len(set(expected)) > 1


def swapped(array, axis, parts):
  """The parts of an axis in reverse order."""
  return np.concatenate(np.split(array, parts, axis)[::-1], axis)


def interleaved(array):
  """Heads of four as if the rotation had interleaved pairs."""
  heads = array.reshape(*array.shape[:-1], -1, 4)
  return heads[..., [0, 2, 1, 3]].reshape(array.shape)


MISTAKES = {  # name: the model, changed keys, and changed blocks
  "order of kv heads": ("llama3", {}, lambda b: {"k": {"kernel": swapped(b["k"]["kernel"], -1, 2)}}),
  "interleaved rotation": (
    "llama2", {}, lambda b: {name: {"kernel": interleaved(b[name]["kernel"])} for name in "qk"}
  ),
  "epsilon": ("llama2", {"norm_eps": 1e-6}, None),
  "base": ("smollm2", {"rope": {"base": 1e4}}, None),
  "no llama3 scaling": ("llama3", {"rope": {"base": 5e5}}, None),
  "no linear scaling": ("linear", {"rope": {}}, None),
  "no yarn scaling": ("yarn", {"rope": {}}, None),
  "no attention factor": ("yarn", {"rope": KEYS["yarn"]["rope"] | {"attention_factor": 1.0}}, None),
  "no norm of q and k": ("qwen3", {"qk_norm": False}, None),
  "norms swapped": ("qwen3", {}, lambda b: {"q_norm": b["k_norm"], "k_norm": b["q_norm"]}),
  "no bias": ("qwen2", {"qkv_bias": False}, None),
}  # fmt: skip


@pytest.mark.parametrize("mistake", slowly(MISTAKES, quick=["order of kv heads", "epsilon", "no attention factor"]))
def test_a_mistake_changes_the_logits(mistake):
  """The comparison above detects each of these."""
  name, changed, blocks = MISTAKES[mistake]
  keys, weights = opened(name)
  changed_blocks = weights["blocks"] | (blocks(weights["blocks"]) if blocks else {})
  found = logits(keys | changed, weights | {"blocks": changed_blocks}, recorded()[f"{name}/tokens"])
  assert np.abs(found - recorded()[f"{name}/logits/40"]).max() > 1e-3


@pytest.mark.parametrize("name", KEYS)
def test_transformers_computes_our_logits_and_tokens_from_a_folder_we_write(tmp_path, name):
  torch = pytest.importorskip("torch", reason="needs requirements-torch.txt; its recorded logits are compared anyway")
  from transformers import AutoModelForCausalLM

  keys, weights = opened(name)
  huggingface.write_folder(tmp_path, keys, weights, GOLDEN / "huggingface" / "bpe.model")
  model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
  for length in LENGTHS:
    with torch.no_grad():
      found = model(torch.tensor(recorded()[f"{name}/tokens"][:, :length])).logits.numpy()
    np.testing.assert_allclose(found, recorded()[f"{name}/logits/{length}"], rtol=0, atol=1e-4)
  prompt = torch.tensor(recorded()[f"{name}/tokens"][:1, :6])
  new = model.generate(prompt, max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)
  assert new[0, 6:].tolist() == recorded()[f"{name}/generated"].tolist()


# --- round trips --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", KEYS)
def test_a_folder_that_is_written_is_read_as_the_same_model(tmp_path, name, dtype):
  keys, weights = opened(name)
  huggingface.write_folder(tmp_path, keys, weights, GOLDEN / "huggingface" / "bpe.model", dtype)
  again = huggingface.inspect_folder(tmp_path)
  rounded = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)).astype(np.float32), weights)
  assert again.architecture == keys and same_bits(huggingface.read_weights(again), rounded)
  theirs, ours = (load_file(folder / "model.safetensors") for folder in (MODELS / name, tmp_path))
  assert {key: x.shape for key, x in theirs.items()} == {key: x.shape for key, x in ours.items()}
  written, original = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, MODELS / name))
  expected = "llama" if name == "mistral" else original["model_type"]
  assert written["model_type"] == expected and written["torch_dtype"] == dtype


# --- mistakes -----------------------------------------------------------------------------------------------------


def changed_folder(tmp_path, name, **changes):
  folder = shutil.copytree(MODELS / name, tmp_path / name)
  config = json.loads((folder / "config.json").read_text()) | changes
  (folder / "config.json").write_text(json.dumps(config))
  return folder


SCALED = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
  ("name", "changes", "sentence"),
  [
    ("llama2", {"model_type": "gpt2"}, "'gpt2', which needs learned positions, LayerNorm and biases; start from"),
    ("llama2", {"model_type": "mamba"}, "a model of model_type llama, mistral, qwen2, qwen3; its config.json has"),
    ("llama2", {"attention_bias": True}, "settings that are not supported: attention_bias is True, not False"),
    ("llama2", {"hidden_act": "gelu"}, "hidden_act is 'gelu', not 'silu'"),
    ("llama2", {"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}, not None"),
    ("llama2", {"rope_parameters": SCALED | {"rope_type": "longrope"}}, "default, linear, dynamic, llama3, yarn; its"),
    ("llama2", {"rope_parameters": SCALED | {"rope_type": "yarn", "truncate": False}}, "{'truncate': False}"),
    ("llama3", {"rope_parameters": SCALED | {"rope_type": "llama3"}}, "must give low_freq_factor, high_freq_factor of"),
    ("qwen3", {"num_key_value_heads": 0}, "must give num_key_value_heads as positive integers"),
    ("llama2", {"num_key_value_heads": 3}, "describes no model: model.num_kv_heads (=3) must be a divisor of"),
    ("llama2", {"head_dim": 3}, "describes no model: model.head_dim (=3) must be a positive even integer"),
    ("llama2", {"rope_parameters": "linear"}, "rope_parameters (='linear') in"),
    ("llama2", {"rope_parameters": SCALED | {"rope_type": "linear", "factor": "2"}}, "factor (='2') in"),
    ("llama2", {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "with default: {'full_attention':"),
    ("llama2", {"rms_norm_eps": "1e-5"}, "rms_norm_eps (='1e-5') in"),
    ("llama2", {"tie_word_embeddings": "yes"}, "must be true or false"),
    ("llama2", {"model_type": ["llama"]}, "its config.json has \"['llama']\"; start from"),
    ("yarn", {"rope_parameters": SCALED | {"rope_type": "yarn", "mscale": 1.0, "mscale_all_dim": 0.5}}, "{'mscale'"),
    ("llama3", {"num_key_value_heads": 4}, "of another shape: model.layers.0.self_attn.k_proj.weight (8, 16) for (16,"),
  ],
)  # fmt: skip
def test_what_the_decoder_lacks_is_refused_by_name(tmp_path, name, changes, sentence):
  folder = changed_folder(tmp_path, name, **changes)
  with pytest.raises(UserError) as caught:
    huggingface.inspect_folder(folder)
  assert sentence in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize(
  ("name", "changes", "positions"),
  [
    ("mistral", {"sliding_window": 12}, 12),
    ("mistral", {"sliding_window": 4096}, 16),
    ("mistral", {"sliding_window": None}, 16),
    ("qwen2", {"sliding_window": 12, "use_sliding_window": False}, 16),
    ("qwen2", {"sliding_window": 12, "use_sliding_window": True}, 12),
  ],
)
def test_a_sliding_window_limits_the_positions(tmp_path, name, changes, positions):
  folder = huggingface.inspect_folder(changed_folder(tmp_path, name, **changes))
  assert folder.architecture["max_position"] == positions


@pytest.mark.parametrize(
  ("name", "changes", "rope"),
  [
    ("yarn", {"original_max_position_embeddings": 32}, {"original_length": 32}),
    ("llama3", {"original_max_position_embeddings": 32}, {"original_length": 32}),
    ("dynamic", {"rope_parameters": SCALED | {"rope_type": "dynamic"}}, {"original_length": 16, "factor": 4.0}),
    ("linear", {"rope_parameters": SCALED | {"rope_type": "linear"}}, {"original_length": 0, "factor": 4.0}),
    ("yarn", {"rope_parameters": SCALED | {"type": "yarn", "truncate": True, "beta_fast": 0}}, {"beta_fast": 32}),
    ("yarn", {"rope_parameters": SCALED | {"type": "yarn", "mscale": 1.0}}, {"attention_factor": None}),
    ("llama2", {"rope_parameters": None, "rope_theta": 5e5}, {"base": 5e5, "scaling": "none"}),
    ("llama2", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}, {"scaling": "linear"}),
  ],
)  # fmt: skip
def test_rotary_positions_are_read_as_transformers_reads_them(tmp_path, name, changes, rope):
  found = huggingface.inspect_folder(changed_folder(tmp_path, name, **changes)).architecture["rope"]
  assert {key: found[key] for key in rope} == rope


def test_a_number_of_kv_heads_of_null_is_that_of_the_heads():
  sizes = dict(vocab_size=48, hidden_size=64, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
  keys = lambda **more: families.model_keys(MODELS, {"model_type": "qwen2"} | sizes | more)
  assert keys(num_key_value_heads=None)["num_kv_heads"] == 2
  with pytest.raises(UserError, match=r"model\.num_kv_heads \(=32\) must be a divisor"):
    keys()  # the default of `transformers`


def test_dynamic_scaling_that_extends_is_written_as_its_base(tmp_path):
  """`transformers` would compute another base for each length."""
  keys, weights = opened("dynamic")
  keys = keys | {"max_position": 40}
  huggingface.write_folder(tmp_path, keys, weights, GOLDEN / "huggingface" / "bpe.model")
  again = huggingface.inspect_folder(tmp_path).architecture
  assert again["rope"]["scaling"] == "none" and again["max_position"] == 40
  tokens = recorded()["dynamic/tokens"]
  np.testing.assert_allclose(logits(again, weights, tokens), logits(keys, weights, tokens), rtol=0, atol=1e-5)
  np.testing.assert_allclose(logits(again, weights, tokens), recorded()["dynamic/logits/40"], rtol=0, atol=1e-4)


def test_heads_that_do_not_divide_the_hidden_size_are_written_as_mistral():
  keys = opened("llama2")[0]
  kind = lambda **changes: families.hugging_face_config(keys | changes)["model_type"]
  assert (kind(), kind(num_heads=3, num_kv_heads=3, head_dim=8)) == ("llama", "mistral")


def test_a_combination_that_no_family_has_cannot_be_exported():
  with pytest.raises(UserError, match=r"no Hugging Face model has model\.qkv_bias as well as model\.qk_norm"):
    families.hugging_face_config(opened("qwen2")[0] | {"qk_norm": True})
