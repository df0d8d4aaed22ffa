"""The model: causality, compilation, rematerialisation, number of parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_model
from ml_collections import FrozenConfigDict
from small_model import equations
from stages import slowly

from switchlora_jax.lowrank.layers import lora_vectors
from switchlora_jax.models import attention_kernel, llama, make_model
from switchlora_jax.models.llama import REMAT, causal_attention, supports_fused
from switchlora_jax.models.loss import mean_loss
from switchlora_jax.models.rotary import Rope, rotary_angles, rotate
from switchlora_jax.planning import cost

METHODS = ["full", "lora", "switchlora"]


def tokens_of(config):
  return np.asarray(small_model.rows(config, 0), np.int32)


@functools.cache
def variables(config):
  """The initial variables, on the host."""
  return small_model.host(jax.jit(small_model.model(config).init)(jax.random.key(0), tokens_of(config)))


def start(config):
  """The model, its params and frozen collections, and a batch of tokens."""
  of = variables(FrozenConfigDict(config))
  return small_model.model(config), of["params"], of.get("frozen", {}), tokens_of(config)


@functools.cache
def logits_of(model):
  """(variables, tokens) -> logits, jitted."""
  return jax.jit(lambda variables, tokens: model.apply(variables, tokens))


def shapes(config):
  """As `start`, but only the shapes."""
  model, tokens = small_model.model(config), tokens_of(config)
  variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
  return model, variables["params"], variables.get("frozen", {}), tokens


def loss_of(model, tokens):
  """(params, frozen) -> mean loss, jitted."""
  return jax.jit(lambda params, frozen: mean_loss(model, params, frozen, tokens))


def gradients(model, tokens):
  """(params, frozen) -> mean loss and the gradients of params, jitted."""
  return jax.jit(jax.value_and_grad(loss_of(model, tokens)))


@pytest.mark.parametrize("method", METHODS)
def test_the_traced_function_does_not_grow_with_depth(method):
  def size(layers):
    model, *state, tokens = shapes(small_model.config(method, model__num_layers=layers))
    traced = gradients(model, tokens).trace(*state)
    return len(list(equations(traced.jaxpr.jaxpr))), len(traced.lower().as_text())

  (shallow, short), (deep, long) = size(2), size(12)
  assert deep == shallow
  assert long < 1.01 * short  # "12" is longer than "2"


def test_later_tokens_do_not_change_earlier_logits():
  model, params, _, tokens = start(small_model.config("full"))
  changed = tokens.copy()
  changed[:, 5] = (tokens[:, 5] + 1) % 64
  before, after = (np.asarray(logits_of(model)({"params": params}, rows)) for rows in (tokens, changed))
  np.testing.assert_array_equal(before[:, :5], after[:, :5])
  assert np.all(np.any(before[:, 5:] != after[:, 5:], -1)), "all later logits change"


def test_the_order_of_earlier_tokens_matters():
  """With rotary embeddings, the last logits depend on the positions of earlier tokens."""
  model, params, _, tokens = start(small_model.config("full"))
  swapped = tokens[:, [1, 0, *range(2, tokens.shape[1])]]
  last = lambda tokens: np.asarray(logits_of(model)({"params": params}, tokens))[:, -1]
  assert np.abs(last(tokens) - last(swapped)).max() > 1e-7


def test_rotary_scores_depend_only_on_the_distance(x64):
  angles, rotated = np.asarray(rotary_angles(Rope(), 12, 8, dtype=jnp.float64)), jax.jit(rotate)
  q, k = np.random.default_rng(0).standard_normal((2, 1, 1, 1, 8))
  at = lambda x, position: np.ravel(rotated(x, angles[position : position + 1]))
  score = lambda query, key: at(q, query) @ at(k, key)
  np.testing.assert_allclose(score(3, 1), score(9, 7), rtol=1e-12)
  assert abs(score(3, 1) - score(3, 2)) > 1e-3


# --- attention ----------------------------------------------------------------------------------------------------


def plain_attention(q, k, v, angles):
  """Softmax attention with rotary positions in NumPy and float64, all scores at once; [batch, heads, length, size]."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  cos, sin = np.cos(angles), np.sin(angles)

  def rotated(x):
    first, second = np.split(x, 2, -1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

  scores = rotated(q) @ rotated(k).swapaxes(-1, -2) / q.shape[-1] ** 0.5
  scores = np.where(np.tri(q.shape[2], dtype=bool), scores, -np.inf)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  return weights / weights.sum(-1, keepdims=True) @ v


def heads_of(length: int, *, batch=2, heads=3, size=8, dtype=np.float64):
  """q, k, v [batch, heads, length, size], and the angles of the positions; float64 needs the fixture `x64`."""
  q, k, v = np.random.default_rng(length).standard_normal((3, batch, heads, length, size)).astype(dtype)
  return q, k, v, np.asarray(rotary_angles(Rope(), length, size, dtype=jnp.promote_types(dtype, np.float32)))


# With blocks of four queries and at most three of them: one query, one block, an odd length, several blocks with a
# shorter last one, and more queries than three blocks of four.
LENGTHS = (1, 3, 4, 5, 9, 12, 13, 50)


@pytest.mark.parametrize("kernel", ["batched", "loop"])
@pytest.mark.parametrize("length", slowly(LENGTHS, quick=(5,)))
def test_attention_in_blocks_is_that_of_all_scores(x64, monkeypatch, kernel, length):
  monkeypatch.setattr(llama, "BLOCK", 4)
  monkeypatch.setattr(llama, "BLOCKS", 3)
  monkeypatch.setattr(llama, "SCORES", 2 * llama.block_size(length) * length)  # two of six heads at a time
  *qkv, angles = heads_of(length)
  found = causal_attention(*qkv, angles, kernel)
  np.testing.assert_allclose(found, plain_attention(*qkv, angles), rtol=1e-12, atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["batched", "loop"])
def test_the_gradients_of_attention_in_blocks(x64, monkeypatch, kernel):
  """Against finite differences in a random direction."""
  monkeypatch.setattr(llama, "BLOCK", 4)
  monkeypatch.setattr(llama, "BLOCKS", 3)
  *qkv, angles = heads_of(9)
  draw = np.random.default_rng(0).standard_normal
  towards, out = [draw(x.shape) for x in qkv], draw(qkv[0].shape)
  value = jax.jit(lambda qkv: jnp.sum(causal_attention(*qkv, angles, kernel) * out))
  at = lambda t: float(value([x + t * d for x, d in zip(qkv, towards, strict=True)]))
  slope = sum(np.sum(g * d) for g, d in zip(jax.jit(jax.grad(value))(qkv), towards, strict=True))
  np.testing.assert_allclose(slope, (at(1e-6) - at(-1e-6)) / 2e-6, rtol=1e-7)


def test_masked_scores_are_not_computed(x64, monkeypatch):
  """Four blocks of four: 10 of 16 blocks of scores, each with two products of 4 × 4 × 8."""
  monkeypatch.setattr(llama, "BLOCK", 4)
  for kernel in ("batched", "loop"):
    work = cost.operations(lambda *args, kernel=kernel: causal_attention(*args, kernel), *heads_of(16))
    assert work == 2 * 3 * 10 * 2 * (2 * 4 * 4 * 8)


@pytest.mark.parametrize("kernel", ["batched", "loop"])
def test_attention_in_16_bits_has_scores_in_32(monkeypatch, kernel):
  monkeypatch.setattr(llama, "BLOCK", 16)
  *qkv, angles = heads_of(40, size=16, dtype=np.float32)
  qkv = [x.astype(jnp.bfloat16) for x in qkv]
  traced = equations(jax.make_jaxpr(lambda *args: causal_attention(*args, kernel))(*qkv, angles).jaxpr)
  assert {e.outvars[0].aval.dtype for e in traced if e.primitive.name == "exp"} == {jnp.dtype("float32")}
  found = causal_attention(*qkv, angles, kernel)
  assert found.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(found, np.float64), plain_attention(*qkv, angles), atol=0.02)


def test_the_loop_takes_as_many_heads_as_the_limit_allows(x64, monkeypatch):
  """A divisor of the number of heads, of all rows of the batch."""
  for most, expected in ((1, 1), (3, 3), (5, 3), (6, 6), (100, 6)):
    monkeypatch.setattr(llama, "SCORES", most * llama.block_size(5) * 5)
    jaxpr = jax.make_jaxpr(lambda *args: causal_attention(*args, "loop"))(*heads_of(5)).jaxpr
    (loop,) = (equation for equation in jaxpr.eqns if equation.primitive.name == "scan")
    assert loop.params["length"] == 6 // expected


def test_attention_of_the_first_token_is_its_own_value():
  *qkv, angles = heads_of(5, dtype=np.float32)
  np.testing.assert_allclose(np.asarray(causal_attention(*qkv, angles))[:, :, 0], qkv[2][:, :, 0], rtol=1e-6)


def test_fused_attention_passes_the_scale_mask_and_axes_of_our_own(monkeypatch):
  """The call that uses cuDNN on a GPU is answered by JAX's own attention here."""
  jax_attention, implementations = jax.nn.dot_product_attention, []

  def answer(*qkv, implementation, **options):
    implementations.append(implementation)
    return jax_attention(*qkv, implementation="xla", **options)

  monkeypatch.setattr(jax.nn, "dot_product_attention", answer)
  attention = jax.jit(causal_attention, static_argnames="kernel")
  *qkv, angles = heads_of(12, size=16, dtype=np.float32)
  narrow = [x.astype(jnp.bfloat16) for x in qkv]
  wide = lambda x: np.asarray(x, np.float32)
  ours = wide(attention(*narrow, angles, kernel="batched"))
  np.testing.assert_allclose(wide(attention(*narrow, angles, kernel="cudnn")), ours, atol=2**-6)
  assert implementations == ["cudnn"]
  other = attention(*qkv, angles, kernel="batched")
  np.testing.assert_array_equal(attention(*qkv, angles, kernel="cudnn"), other)
  assert implementations == ["cudnn"], "cuDNN does not support float32"


def test_the_kernel_of_a_device():
  device = lambda platform, capability="": type("", (), dict(platform=platform, compute_capability=capability))
  assert attention_kernel(device("cpu")) == "loop" and make_model(small_model.config().model).attention_kernel == "loop"
  kernels = [attention_kernel(device("gpu", capability)) for capability in ("7.5", "8.0", "9.0")]
  assert kernels == ["batched", "cudnn", "cudnn"]


@pytest.mark.parametrize(
  ("dtype", "length", "head_size", "supported"),
  [
    ("bfloat16", 512, 64, True),
    ("float16", 100, 128, True),
    ("bfloat16", 8, 8, True),
    ("bfloat16", 512, 12, False),
    ("bfloat16", 512, 136, False),
    ("bfloat16", 511, 64, False),
    ("float32", 512, 64, False),
    ("float64", 512, 64, False),
  ],
)
def test_cudnn_supports_some_dtypes_lengths_and_head_sizes(dtype, length, head_size, supported):
  assert supports_fused(jnp.dtype(dtype), length, head_size) == supported


def test_without_a_head_the_model_returns_the_input_of_the_head():
  model, params, frozen, tokens = start(small_model.config("switchlora"))
  of = lambda model: np.asarray(logits_of(model)({"params": params, "frozen": frozen}, tokens))
  hidden = of(model.clone(head=False))
  assert hidden.shape == (*tokens.shape, 16)
  np.testing.assert_allclose(hidden @ params["head"]["kernel"][None], of(model), rtol=0, atol=1e-6)


# --- rematerialisation --------------------------------------------------------------------------------------------


@functools.cache
def first_gradients(remat):
  """The initial loss of SwitchLoRA and its gradients, on the host."""
  model, *state, tokens = start(small_model.config("switchlora", remat=remat))
  return small_model.host(gradients(model, tokens)(*state))


@pytest.mark.parametrize("remat", slowly(["linear", "full"], quick=["full"]))
def test_remat_gives_the_same_numbers(remat):
  results = first_gradients("none"), first_gradients(remat)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-6), *results)


@pytest.mark.parametrize("method", ["full", "switchlora"])
def test_the_operations_that_remat_recomputes(method):
  """`linear`: attention. `full`: also the linear layers, except the last of a block, whose output is not needed."""

  def work(remat):
    model, *state, tokens = shapes(small_model.config(method, remat=remat))
    return cost.operations(gradients(model, tokens), *state)

  layers, tokens, hidden, inner, length, rank = 2, 16 * 8, 16, 24, 8, 4
  attention = layers * 2 * 2 * tokens * length * hidden
  weights = layers * (4 * hidden**2 + 2 * hidden * inner)
  merging = 2 * rank * weights if method == "switchlora" else 0
  assert work("linear") - work("none") == attention
  assert work("full") - work("none") == attention + 2 * tokens * weights + merging


def stacked_shapes(method, remat, **changes) -> list[tuple]:
  """Shapes that the scan over three layers stacks: gradients, and what is saved for the backward pass."""
  model, *state, tokens = shapes(small_model.config(method, remat=remat, model__num_layers=3, **changes))
  traced = equations(jax.make_jaxpr(gradients(model, tokens))(*state).jaxpr)
  outputs = [out.aval.shape for e in traced if e.primitive.name == "scan" for out in e.outvars]
  return [shape for shape in outputs if shape[:1] == (3,)]


def test_the_activations_that_remat_saves():
  """For a block with 16 rows of 8 tokens. `full`: its input. `linear`: also q, k, v, o, gate and up. `none`: also
  the result of attention, of two heads."""
  of_activations = lambda remat: sorted(s[1:] for s in stacked_shapes("switchlora", remat) if s[1] == 16 and len(s) > 3)
  assert of_activations("full") == [(16, 8, 16)]
  assert of_activations("linear") == [(16, 8, 16)] * 5 + [(16, 8, 24)] * 2
  assert of_activations("none") == sorted([*of_activations("linear"), (16, 2, 8, 8)])


@pytest.mark.parametrize("remat", slowly(REMAT, quick=["full"]))
def test_no_copy_of_the_frozen_kernels_is_stacked(remat):
  """What the layer scan saves for the backward pass includes no [layers, in, out] array."""
  kernels = {(3, 16, 16), (3, 16, 24), (3, 24, 16)}
  for dtype in ("float32", "bfloat16"):
    assert not set(stacked_shapes("switchlora", remat, dtype=dtype)) & kernels
  assert kernels <= set(stacked_shapes("full", remat)), "full-rank training stacks their gradients"


@pytest.mark.parametrize("method", METHODS)
def test_the_number_of_parameters_matches_the_formula(method):
  config = small_model.config(method, model__num_layers=3, rank=5)
  params, frozen = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in shapes(config)[1:3])
  vocabulary, hidden, inner, layers, rank = 64, 16, 24, 3, 5
  kernels = layers * (4 * hidden**2 + 3 * hidden * inner)
  vectors = layers * rank * (4 * 2 * hidden + 3 * (hidden + inner))
  others = 2 * vocabulary * hidden + (2 * layers + 1) * hidden  # embedding, head, norms
  assert (params, frozen) == ((others + kernels, 0) if method == "full" else (others + vectors, kernels))


def test_with_one_seed_all_methods_have_the_same_initial_function():
  losses = {}
  for method in METHODS:
    model, params, frozen, tokens = start(small_model.config(method))
    loss = loss_of(model, tokens)
    losses[method] = loss(params, frozen)
  np.testing.assert_allclose(losses["lora"], losses["full"], rtol=1e-5)
  np.testing.assert_array_equal(losses["switchlora"], losses["lora"])
  no_adapter = jax.tree.map(lambda p, is_vector: np.zeros_like(p) if is_vector else p, params, lora_vectors(params))
  assert abs(loss(no_adapter, frozen) - losses["full"]) > 1e-3


def test_the_default_layers_are_initialised_as_in_full_rank_training():
  """The standard deviation is 0.02; Flax's default initialisation would give 1/√64."""
  layer = make_model(small_model.config("full").model).dense(64)
  params = small_model.host(jax.jit(layer.init)(jax.random.key(0), np.zeros((1, 64), np.float32))["params"])
  assert params.keys() == {"kernel"}
  np.testing.assert_allclose(np.std(params["kernel"]), 0.02, rtol=0.05)


def test_all_linear_layers_of_a_block_have_adapters_and_nothing_else():
  _, params, frozen, _ = shapes(small_model.config("switchlora"))
  adapted = {name for name, layer in params["blocks"].items() if "lora_a" in layer}
  assert adapted == set(frozen["blocks"]) == set("qkvo") | {"gate", "up", "down"}
  assert set(params) == {"embed", "blocks", "norm", "head"} and set(params["head"]) == {"kernel"}


@pytest.mark.slow
def test_a_bfloat16_model_computes_in_bfloat16_and_stores_float32():
  model, *state, tokens = shapes(small_model.config("switchlora", dtype="bfloat16"))
  assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32")}
  _, params, frozen, _ = start(small_model.config("switchlora"))
  assert jax.eval_shape(model.apply, {"params": params, "frozen": frozen}, tokens).dtype == jnp.bfloat16
  loss, grads = gradients(model, tokens)(params, frozen)
  assert loss.dtype == jnp.float32
  assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
  np.testing.assert_allclose(loss, first_gradients("none")[0], rtol=1e-2)


def test_the_embeddings_gradient_is_summed_in_its_own_dtype():
  """In bfloat16 a sum of ones would stop at 256."""
  model, *state, tokens = shapes(small_model.config("full", dtype="bfloat16"))
  traced = equations(jax.make_jaxpr(gradients(model, tokens))(*state).jaxpr)
  summed = {e.outvars[0].aval.dtype for e in traced if e.primitive.name == "scatter-add"}
  assert summed == {jnp.dtype("float32")}
