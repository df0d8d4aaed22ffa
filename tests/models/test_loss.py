"""The chunked loss: the values and gradients of the unchunked one, without its largest array."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_model
from stages import slowly

from switchlora_jax.models.loss import (
  CHUNK,
  mean_loss,
  mean_token_loss,
  padded_token_loss,
  row_losses,
  token_losses,
)
from switchlora_jax.planning import cost

pytestmark = pytest.mark.two_linear_layers

TOKENS, HIDDEN, VOCABULARY = 2500, 8, 41  # three chunks, the last one padded


def unchunked(x, kernel, targets):
  """The losses that `token_losses` computes, without chunks."""
  logits = x @ kernel.astype(x.dtype)
  wide = logits.astype(jnp.promote_types(x.dtype, jnp.float32))
  return optax.softmax_cross_entropy_with_integer_labels(wide, targets)


def unchunked_mean(x, kernel, targets):
  return unchunked(x, kernel, targets).mean()


def drawn(tokens=TOKENS, dtype=jnp.float32):
  """Hidden states in `dtype`, a kernel that gives logits of size 3, and targets."""
  rng, wide = np.random.default_rng(0), jnp.promote_types(dtype, jnp.float32)
  kernel = rng.standard_normal((HIDDEN, VOCABULARY)).astype(wide)
  x = rng.standard_normal((tokens, HIDDEN)).astype(wide).astype(dtype)
  return x, kernel, rng.integers(0, VOCABULARY, tokens, np.int32)


def value_and_gradients(function):
  return jax.jit(jax.value_and_grad(function, argnums=(0, 1)))


# --- its numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", slowly([1, 7, 8, CHUNK - 1, CHUNK, CHUNK + 1, TOKENS], quick=[1, CHUNK, TOKENS]))
def test_losses_and_gradients_are_the_unchunked_ones(tokens, x64):
  args = drawn(tokens, jnp.float64)
  np.testing.assert_allclose(jax.jit(token_losses)(*args), jax.jit(unchunked)(*args), rtol=0, atol=1e-12)
  found, expected = (value_and_gradients(function)(*args) for function in (mean_token_loss, unchunked_mean))
  assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float64")}
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-12), found, expected)
  loss, last = jax.jit(mean_token_loss), np.arange(tokens) == tokens - 1
  np.testing.assert_allclose(loss(*args), found[0], rtol=1e-14)
  assert abs(loss(*args[:2], (args[2] + last) % VOCABULARY) - found[0]) > 1e-6, "the last token counts"


@pytest.mark.parametrize("padding", ["none", "some", "all"])
def test_padding_is_neither_a_target_nor_counted(padding, x64):
  """Loss and gradients are those of the real targets alone, over any count. Without any, they are 0 and not 0 / 0."""
  x, kernel, targets = drawn(dtype=jnp.float64)
  real = np.random.default_rng(1).random(TOKENS) < {"none": 1, "some": 0.6, "all": 0}[padding]
  padded, count = np.where(real, targets, -1), np.int32(2 * real.sum())
  loss, (dx, d_kernel) = value_and_gradients(padded_token_loss)(x, kernel, padded, count)
  np.testing.assert_allclose(jax.jit(padded_token_loss)(x, kernel, padded, count), loss, rtol=1e-14)
  assert not dx[~real].any()
  if padding == "all":
    assert loss == 0 and not np.any(d_kernel)
    return
  expected, (expected_dx, expected_d_kernel) = value_and_gradients(unchunked_mean)(x[real], kernel, targets[real])
  for found, other in ((loss, expected), (dx[real], expected_dx), (d_kernel, expected_d_kernel)):
    np.testing.assert_allclose(2 * found, other, rtol=0, atol=1e-12)


def test_losses_and_gradients_are_the_unchunked_ones_in_float32():
  """Sums of 2,500 terms in another order differ by a few times 2⁻²⁴ of the largest entry."""
  args = drawn()
  found, expected = (value_and_gradients(function)(*args) for function in (mean_token_loss, unchunked_mean))
  for x, y in zip(*map(jax.tree.leaves, small_model.host((found, expected))), strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=2**-20 * np.abs(y).max())


def test_the_gradient_is_scaled_by_that_of_a_function_of_the_loss(x64):
  args = drawn(dtype=jnp.float64)
  found, expected = (
    jax.jit(jax.grad(lambda *args, of=of: jnp.sin(3 * of(*args)), argnums=(0, 1)))(*args)
    for of in (mean_token_loss, unchunked_mean)
  )
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-12), found, expected)


def test_in_bfloat16_the_loss_is_more_exact_than_the_unchunked_one():
  """The kernel's gradient is summed in float32."""
  x, kernel, targets = drawn(dtype=jnp.bfloat16)
  narrow = kernel.astype(jnp.bfloat16).astype(np.float32)
  exact = small_model.host(value_and_gradients(unchunked_mean)(x.astype(np.float32), narrow, targets))
  errors = []
  for function in (mean_token_loss, unchunked_mean):
    found = value_and_gradients(function)(x, kernel, targets)
    assert [leaf.dtype for leaf in jax.tree.leaves(found)] == [jnp.float32, jnp.bfloat16, jnp.float32]
    distance = lambda x, y: float(np.linalg.norm(np.asarray(x, np.float64) - np.asarray(y, np.float64)))
    errors.append([distance(x, y) for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True)])
  chunked, without_chunks = errors
  assert all(mine <= theirs for mine, theirs in zip(chunked, without_chunks, strict=True)), errors
  assert chunked[2] < 2**-9 * np.linalg.norm(exact[1][1]), "the kernel's gradient"


def test_no_product_is_rounded_to_bfloat16():
  """Checked in the jaxpr, because XLA may remove roundings when it compiles."""
  traced = jax.make_jaxpr(value_and_gradients(mean_token_loss))(*drawn(dtype=jnp.bfloat16))
  products = [e.outvars[0].aval.dtype for e in small_model.equations(traced.jaxpr) if e.primitive.name == "dot_general"]
  assert products == [jnp.dtype("float32")] * 3


# --- memory and operations ----------------------------------------------------------------------------------------


def float_arrays(compiled) -> set[tuple[int, ...]]:
  """The shapes of all arrays of floating-point numbers in a compiled program."""
  found = re.findall(r"\b(?:f16|bf16|f32|f64)\[([\d,]+)\]", compiled.as_text())
  return {tuple(int(n) for n in shape.split(",")) for shape in found}


def test_no_array_of_the_loss_has_the_logits_of_all_tokens():
  args = drawn()
  largest = {}
  for function in (mean_token_loss, unchunked_mean):
    shapes = float_arrays(value_and_gradients(function).lower(*args).compile())
    largest[function] = max(math.prod(shape) for shape in shapes)
  assert largest[unchunked_mean] == TOKENS * VOCABULARY
  assert largest[mean_token_loss] <= CHUNK * VOCABULARY


def test_no_array_of_a_train_step_has_the_logits_of_all_tokens():
  config = small_model.config("switchlora", model__vocab_size=61, batch_size=12, seq_len=256)
  phase = small_model.phase(config, 1)
  tokens = jax.ShapeDtypeStruct((config.batch_size, config.seq_len), jnp.int32)
  compiled = phase.step.lower(phase.abstract, tokens).compile()
  of_vocabulary = {shape for shape in float_arrays(compiled) if 61 in shape}
  assert max(math.prod(shape) for shape in of_vocabulary) in range(16 * 61 + 1, CHUNK * 61 + 1)


def test_the_loss_and_its_gradients_need_no_more_operations_than_the_unchunked_ones():
  args = drawn(2 * CHUNK)
  forward = 2 * 2 * CHUNK * HIDDEN * VOCABULARY
  assert cost.operations(mean_token_loss, *args) == forward
  assert cost.operations(value_and_gradients(mean_token_loss), *args) == 3 * forward
  assert cost.operations(value_and_gradients(unchunked_mean), *args) == 3 * forward


# --- in a model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "switchlora"])
def test_a_models_loss_is_that_of_its_logits(method, x64):
  config = small_model.config(method, dtype="float64", param_dtype="float64")
  model, rows = small_model.model(config), np.asarray(small_model.rows(config, 0), np.int32)
  abstract, rng = small_model.phase(config, 1).abstract, np.random.default_rng(0)
  draw = lambda shapes: jax.tree.map(lambda x: 0.1 * rng.standard_normal(x.shape), shapes)
  params, frozen = draw(abstract.params), draw(abstract.frozen)

  def of_logits(params):
    logits = model.apply({"params": params, "frozen": frozen}, rows)[:, :-1]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean(-1)
    return losses.mean(), losses

  near = lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-12)
  (mean, losses), grads = jax.jit(jax.value_and_grad(of_logits, has_aux=True))(params)
  near(jax.jit(lambda params: row_losses(model, params, frozen, rows))(params), losses)
  found = jax.jit(jax.value_and_grad(lambda params: mean_loss(model, params, frozen, rows)))(params)
  jax.tree.map(near, found, (mean, grads))
  assert np.abs(np.asarray(found[1]["head"]["kernel"])).max() > 1e-3
