"""The model: what it may look at, what it costs to compile, how many parameters it has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_model
from jax.extend.core import jaxprs_in_params

from switchlora_jax.dense import lora_vectors
from switchlora_jax.llama import causal_attention, rotary_angles, rotate
from switchlora_jax.train_step import row_losses

METHODS = ["full", "lora", "switchlora"]


def start(config):
  """The model, its params and frozen collections, and a batch of tokens."""
  model, tokens = small_model.model(config), jnp.asarray(small_model.rows(config, 0), jnp.int32)
  variables = jax.jit(model.init)(jax.random.key(0), tokens)
  return model, variables["params"], variables.get("frozen", {}), tokens


def shapes(config):
  """As `start`, of shapes alone."""
  model, tokens = small_model.model(config), jnp.asarray(small_model.rows(config, 0), jnp.int32)
  variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
  return model, variables["params"], variables.get("frozen", {}), tokens


def loss_of(model, tokens):
  """(params, frozen) -> mean loss, jitted."""
  return jax.jit(lambda params, frozen: row_losses(model, params, frozen, tokens).mean())


def gradients(model, tokens):
  """(params, frozen) -> mean loss and the gradients of params, jitted."""
  return jax.jit(jax.value_and_grad(loss_of(model, tokens)))


def equations(jaxpr) -> int:
  """How many equations a jaxpr has, those of its inner jaxprs included."""
  return len(jaxpr.eqns) + sum(equations(i) for e in jaxpr.eqns for i in jaxprs_in_params(e.params))


@pytest.mark.parametrize("method", METHODS)
def test_the_program_does_not_grow_with_depth(method):
  def size(layers):
    model, *state, tokens = shapes(small_model.config(method, model__num_layers=layers))
    traced = gradients(model, tokens).trace(*state)
    return equations(traced.jaxpr.jaxpr), len(traced.lower().as_text())

  (shallow, short), (deep, long) = size(2), size(12)
  assert deep == shallow
  assert long < 1.01 * short  # "12" is longer than "2"


def test_later_tokens_do_not_change_earlier_logits():
  model, params, _, tokens = start(small_model.config("full"))
  logits = jax.jit(lambda tokens: model.apply({"params": params}, tokens))
  changed = tokens.at[:, 5].set((tokens[:, 5] + 1) % 64)
  before, after = logits(tokens), logits(changed)
  np.testing.assert_array_equal(before[:, :5], after[:, :5])
  assert np.all(np.any(before[:, 5:] != after[:, 5:], -1)), "and every later one sees the change"


def test_the_order_of_earlier_tokens_matters():
  """Rotary positions: the last logits know not only which tokens came before, but where."""
  model, params, _, tokens = start(small_model.config("full"))
  swapped = tokens.at[:, 0].set(tokens[:, 1]).at[:, 1].set(tokens[:, 0])
  last = jax.jit(lambda tokens: model.apply({"params": params}, tokens)[:, -1])
  assert np.abs(last(tokens) - last(swapped)).max() > 1e-7


def test_rotation_depends_on_the_distance_alone(x64):
  angles = rotary_angles(12, 8, jnp.float64)
  q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8), jnp.float64)
  at = lambda x, position: rotate(x, angles[position : position + 1]).ravel()
  score = lambda query, key: at(q, query) @ at(k, key)
  np.testing.assert_allclose(score(3, 1), score(9, 7), rtol=1e-12)
  assert abs(score(3, 1) - score(3, 2)) > 1e-3


def test_attention_of_the_first_token_is_its_own_value():
  q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 2, 4))
  np.testing.assert_allclose(causal_attention(q, k, v)[:, 0], v[:, 0], rtol=1e-6)


def test_remat_gives_the_same_numbers():
  results = []
  for remat in (False, True):
    model, *state, tokens = start(small_model.config("switchlora", remat=remat))
    traced = gradients(model, tokens).trace(*state)
    results.append((traced.lower().compile()(*state), str(traced.jaxpr)))
  (usual, plain), (recomputed, with_remat) = results
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-6), usual, recomputed)
  assert "remat" in with_remat and "remat" not in plain


@pytest.mark.parametrize("remat", [False, True])
def test_no_copy_of_the_frozen_kernels_is_stacked(remat):
  """What the layer scan hands from forward to backward has no [layers, in, out] beside the kernels themselves."""

  def handed_out(jaxpr):
    own = {out.aval.shape for e in jaxpr.eqns if e.primitive.name == "scan" for out in e.outvars}
    return own.union(*(handed_out(inner) for e in jaxpr.eqns for inner in jaxprs_in_params(e.params)))

  def saved(method):
    model, *state, tokens = shapes(small_model.config(method, remat=remat, model__num_layers=3))
    return handed_out(jax.make_jaxpr(gradients(model, tokens))(*state).jaxpr)

  kernels = {(3, 16, 16), (3, 16, 24), (3, 24, 16)}
  assert not saved("switchlora") & kernels
  assert kernels <= saved("full"), "where they are trained, their gradients are"


@pytest.mark.parametrize("method", METHODS)
def test_parameters_are_as_many_as_the_formula_says(method):
  config = small_model.config(method, model__num_layers=3, rank=5)
  params, frozen = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in shapes(config)[1:3])
  vocabulary, hidden, inner, layers, rank = 64, 16, 24, 3, 5
  kernels = layers * (4 * hidden**2 + 3 * hidden * inner)
  vectors = layers * rank * (4 * 2 * hidden + 3 * (hidden + inner))
  whole = 2 * vocabulary * hidden + (2 * layers + 1) * hidden  # embedding, head, norms
  assert (params, frozen) == ((whole + kernels, 0) if method == "full" else (whole + vectors, kernels))


def test_at_one_seed_all_methods_start_from_one_function():
  losses = {}
  for method in METHODS:
    model, params, frozen, tokens = start(small_model.config(method))
    losses[method] = loss_of(model, tokens)(params, frozen)
  np.testing.assert_allclose(losses["lora"], losses["full"], rtol=1e-5)
  np.testing.assert_array_equal(losses["switchlora"], losses["lora"])
  no_adapter = jax.tree.map(lambda p, is_vector: jnp.where(is_vector, 0, p), params, lora_vectors(params))
  assert abs(loss_of(model, tokens)(no_adapter, frozen) - losses["full"]) > 1e-3


def test_all_linear_layers_of_a_block_have_adapters_and_nothing_else():
  _, params, frozen, _ = shapes(small_model.config("switchlora"))
  adapted = {name for name, layer in params["blocks"].items() if "lora_a" in layer}
  assert adapted == set(frozen["blocks"]) == set("qkvo") | {"gate", "up", "down"}
  assert set(params) == {"embed", "blocks", "norm", "head"} and set(params["head"]) == {"kernel"}


def test_bfloat16_computes_narrow_and_stores_wide():
  model, params, frozen, tokens = start(small_model.config("switchlora", dtype="bfloat16"))
  assert {leaf.dtype for leaf in jax.tree.leaves((params, frozen))} == {jnp.dtype("float32")}
  assert jax.eval_shape(model.apply, {"params": params, "frozen": frozen}, tokens).dtype == jnp.bfloat16
  loss, grads = gradients(model, tokens)(params, frozen)
  assert loss.dtype == jnp.float32
  assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
  wide = small_model.model(small_model.config("switchlora"))
  np.testing.assert_allclose(loss, loss_of(wide, tokens)(params, frozen), rtol=1e-2)
