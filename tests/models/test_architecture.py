"""Architectures other than LLaMA 1: grouped heads, biases, norms of heads and tied embeddings."""

import jax
import numpy as np
import pytest
import small_model
from flax.traverse_util import flatten_dict
from small_model import host, same_bits

from switchlora_jax.lowrank.layers import ADAPTER
from switchlora_jax.lowrank.spares import SPARES
from switchlora_jax.methods import METHODS
from switchlora_jax.models import architecture_of, make_model, weights
from switchlora_jax.models.loss import mean_loss
from switchlora_jax.parallel.sharding import by_rows
from switchlora_jax.training.throughput import model_flops

GROUPED = dict(model__num_heads=4, model__num_kv_heads=2, model__head_dim=6)
MODERN = GROUPED | dict(model__qkv_bias=True, model__qk_norm=True, model__tied_embeddings=True)
SHARDED = {f"sharding__{part}": "sharded" for part in ("trained", "optimizer", "frozen", "candidates")}


def drawn(keys, dtype=np.float32):
  """The model of keys of `config.model`, and weights drawn large enough that all of them matter."""
  draw = np.random.default_rng(0).standard_normal
  shapes = architecture_of(keys).plain_shapes()
  flat = {tuple(path.split("/")): draw(shape).astype(dtype) for path, shape in shapes.items()}
  return make_model(keys, dtype=dtype, param_dtype=dtype), weights.unflatten_dict(flat)


def loss_and_gradients(model, params, tokens):
  value = jax.jit(jax.value_and_grad(lambda params: mean_loss(model, params, {}, tokens)))
  return host(value(params))


TOKENS = np.random.default_rng(1).integers(0, 64, (2, 8))


@pytest.mark.parametrize("changes", [{}, GROUPED, MODERN], ids=["llama", "grouped", "modern"])
def test_the_shapes_are_those_of_the_params(changes):
  keys = small_model.config("full", **changes).model
  params = jax.eval_shape(make_model(keys).init, jax.random.key(0), TOKENS)["params"]
  found = {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()}
  assert found == architecture_of(keys).plain_shapes()


def test_keys_that_are_left_out_are_those_of_llama():
  sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2)
  described = architecture_of(small_model.config("full").model)
  assert architecture_of(sizes) == described._replace(max_position=None)
  assert (described.num_kv_heads, described.head_dim, described.max_position) == (2, 8, 8)


def test_a_head_of_keys_serves_successive_heads_of_queries(x64):
  """The grouped model has the logits and gradients of one whose k and v repeat each head."""
  keys = small_model.config("full", **GROUPED).model.to_dict()
  model, params = drawn(keys, np.float64)
  repeat = lambda kernel: np.repeat(kernel.reshape(2, 16, 2, 6), 2, axis=2).reshape(2, 16, 24)
  repeated = {name: {"kernel": repeat(params["blocks"][name]["kernel"])} for name in "kv"}
  loss, gradients = loss_and_gradients(model, params, TOKENS)
  wide = params | {"blocks": params["blocks"] | repeated}
  expected, wide_gradients = loss_and_gradients(
    make_model(keys | {"num_kv_heads": 4}, dtype=np.float64, param_dtype=np.float64), wide, TOKENS
  )
  np.testing.assert_allclose(loss, expected, rtol=1e-12)
  for name in "kv":
    of_group = wide_gradients["blocks"][name]["kernel"].reshape(2, 16, 2, 2, 6).sum(3).reshape(2, 16, 12)
    np.testing.assert_allclose(gradients["blocks"][name]["kernel"], of_group, rtol=1e-9, atol=1e-12)


def test_a_tied_embedding_has_the_gradients_of_both_of_its_uses():
  keys = small_model.config("full", **MODERN).model.to_dict()
  model, params = drawn(keys)
  loss, gradients = loss_and_gradients(model, params, TOKENS)
  apart = params | {"head": {"kernel": params["embed"]["embedding"].T}}
  expected, untied = loss_and_gradients(make_model(keys | {"tied_embeddings": False}), apart, TOKENS)
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  both = untied["embed"]["embedding"] + untied["head"]["kernel"].T
  np.testing.assert_allclose(gradients["embed"]["embedding"], both, rtol=1e-4, atol=1e-6)
  assert np.abs(untied["head"]["kernel"]).max() > 1e-3


def test_biases_and_norms_of_heads_are_no_linear_layers():
  """They have the learning rate of the rest and no weight decay, and no method projects them."""
  paths = [
    tuple(path.split("/")) for path in architecture_of(small_model.config("full", **MODERN).model).plain_shapes()
  ]
  linear = {path[1] for path in paths if weights.is_linear(path)}
  assert linear == {"q", "k", "v", "o", "gate", "up", "down"} == {path[1] for path in paths if weights.in_block(path)}
  vectors = {path[-2] for path in paths if weights.is_vector(path)}
  assert vectors == {"q_bias", "k_bias", "v_bias", "q_norm", "k_norm", "attention_norm", "mlp_norm", "norm"}


def test_model_flops_count_the_smaller_kernels():
  full, grouped = (model_flops(small_model.config("full", **changes).model, 3, 5) for changes in ({}, GROUPED))
  assert full == 6 * 15 * (2 * (4 * 16 * 16 + 3 * 16 * 24 + 16 * 5) + 16 * 64)
  assert grouped == 6 * 15 * (2 * (2 * 16 * 24 + 2 * 16 * 12 + 3 * 16 * 24 + 24 * 5) + 16 * 64)


# --- training -----------------------------------------------------------------------------------------------------


def train(method, steps=3, devices=1, **changes):
  """(states before the first step and after the last, losses), on the host."""
  config = small_model.config(method, batch_size=8, **changes)
  mesh, phase = small_model.mesh(devices, config.sharding.fsdp), small_model.phase(config, devices)
  state = phase.create()
  first, losses = host(state), []
  for number in range(steps):
    rows = np.asarray(small_model.rows(config, number % 2), np.int32)
    state, report = phase.step(state, jax.device_put(rows, by_rows(mesh)))
    losses.append(float(report["loss"]))
  return first, host(state), losses


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_such_a_model(method):
  first, last, losses = train(method, 8, **MODERN)
  assert losses[-2] < losses[0] and losses[-1] < losses[1]
  before, after = flatten_dict(first.params), flatten_dict(last.params)
  assert not [path for path in before if np.array_equal(before[path], after[path])], "all parameters train"


def test_layers_of_another_shape_switch_with_their_own_candidates():
  """k and v, of 16 × 12, have 12 candidates; q and o, of 16 × 24, have 16."""
  first, last, _ = train("switchlora", 8, **MODERN)
  spares = {name: layer["spare_a"].shape for name, layer in first.candidates["blocks"].items()}
  assert spares["k"] == spares["v"] == (2, 12 - 4, 16)
  assert spares["q"] == (2, 16 - 4, 16) and spares["o"] == (2, 16 - 4, 24)
  for name in "qkvo":
    layer, params = last.candidates["blocks"][name], last.params["blocks"][name]
    assert (layer["cursor"] > 0).all()
    vectors = [np.concatenate([params[a], layer[b]], axis=1) for a, b in zip(ADAPTER, SPARES, strict=True)]
    assert [len(np.unique(x[0], axis=0)) for x in vectors] == [x.shape[1] for x in vectors], "no vector is lost"


@pytest.mark.parametrize("method", ["lora", "relora", "switchlora"])
def test_layers_whose_smaller_side_is_at_most_the_rank_are_a_warning(method):
  lines = lambda rank: "\n".join(METHODS[method].warnings(small_model.config(method, rank=rank, **GROUPED)))
  assert "k, v" not in lines(11)
  assert "the adapters of k, v (12) have more parameters than their kernels" in lines(12)
  assert ("the layers k, v (12) have no spare vectors at rank 12" in lines(12)) == (method == "switchlora")


@pytest.mark.slow
def test_such_a_model_trains_the_same_run_sharded_over_4_devices():
  first, last, losses = train("switchlora", 4, **MODERN)
  _, found, sharded = train("switchlora", 4, 4, **MODERN, sharding__fsdp=2, **SHARDED)
  np.testing.assert_allclose(sharded, losses, rtol=1e-5)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-4), found.params, last.params)
  assert not same_bits(first.params, last.params)
