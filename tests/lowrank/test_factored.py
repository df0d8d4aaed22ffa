"""Layers without a base kernel: their function and gradients, their first values, and refactorised factors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchlora_jax.lowrank import factored
from switchlora_jax.lowrank.factored import (
  FactoredDense,
  SparseFactoredDense,
  best_factors,
  draw_support,
  refactored,
  support_size,
)
from switchlora_jax.models.llama import LINEAR

IN, OUT, RANK = 12, 7, 3
KINDS = {"low rank": FactoredDense(OUT, RANK, alpha=2.0), "sparse": SparseFactoredDense(OUT, RANK, 2.0, density=0.2)}
each = pytest.mark.parametrize("layer", KINDS.values(), ids=KINDS)


def normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape)


def variables_of(layer, dtype="float64"):
  """The first variables of a layer, with random factors and values in place of the first ones."""
  found = layer.clone(param_dtype=jnp.dtype(dtype)).init(jax.random.key(0), np.zeros((1, IN), dtype))
  params = {name: normal(i, *x.shape).astype(dtype) for i, (name, x) in enumerate(sorted(found["params"].items()))}
  return found | {"params": params}


def kernel_of(variables, scale):
  """The kernel [in, out], element by element in NumPy."""
  params = variables["params"]
  kernel = scale * np.asarray(params["lora_a"], np.float64).T @ np.asarray(params["lora_b"], np.float64)
  if "frozen" in variables:
    for position, value in zip(variables["frozen"]["sparse_support"], params["sparse_values"], strict=True):
      kernel[int(position) // OUT, int(position) % OUT] += value
  return kernel


@each
def test_the_function_and_its_gradients_are_those_of_the_dense_kernel(layer, x64):
  """By the chain rule through a kernel that NumPy builds. The input has two leading axes."""
  layer, variables = layer.clone(dtype=jnp.float64), variables_of(layer)
  x, dy, params = normal(5, 2, 4, IN), normal(6, 2, 4, OUT), variables["params"]
  y, pull = jax.vjp(lambda p, x: layer.apply(variables | {"params": p}, x), params, x)
  near = dict(rtol=0, atol=1e-12)
  kernel = kernel_of(variables, layer.scale)
  np.testing.assert_allclose(y, x @ kernel, **near)
  grads, dx = pull(dy)
  whole = np.einsum("abi,abo->io", x, dy)
  np.testing.assert_allclose(dx, dy @ kernel.T, **near)
  np.testing.assert_allclose(grads["lora_a"], layer.scale * params["lora_b"] @ whole.T, **near)
  np.testing.assert_allclose(grads["lora_b"], layer.scale * params["lora_a"] @ whole, **near)
  if "sparse_values" in grads:
    np.testing.assert_allclose(grads["sparse_values"], whole.ravel()[variables["frozen"]["sparse_support"]], **near)


@each
def test_in_bfloat16_gradients_are_float32_and_near(layer):
  """Products of 8 tokens in bfloat16 have relative errors of a few 2⁻⁸; sums are float32."""
  variables = jax.tree.map(jnp.asarray, variables_of(layer, "float32"))
  x, dy = (jnp.asarray(normal(seed, 8, size), jnp.float32) for seed, size in ((5, IN), (6, OUT)))

  def grads(dtype):
    _, pull = jax.vjp(lambda p: layer.clone(dtype=dtype).apply(variables | {"params": p}, x), variables["params"])
    return pull(dy.astype(dtype))[0]

  for exact, found in zip(*map(jax.tree.leaves, (grads(jnp.float32), grads(jnp.bfloat16))), strict=True):
    assert found.dtype == jnp.float32
    error = np.linalg.norm(np.asarray(found) - exact) / np.linalg.norm(exact)
    assert 0 < error < 4 * 2**-8


@each
def test_a_plain_kernel_is_not_stored(layer):
  sizes = {x.size for x in jax.tree.leaves(variables_of(layer, "float32"))}
  assert max(sizes) < IN * OUT


def test_the_narrow_product_is_saved_like_the_outputs_of_the_models():
  assert factored.SAVED == LINEAR


# --- first values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1.0, 16.0])
def test_the_first_product_has_the_deviation_of_a_plain_kernel_and_factors_of_equal_norm(alpha):
  layer = FactoredDense(300, 40, alpha)
  params = layer.init(jax.random.key(0), np.zeros((1, 100), np.float32))["params"]
  a, b = (np.asarray(params[name], np.float64) for name in ("lora_a", "lora_b"))
  assert np.std(layer.scale * a.T @ b) == pytest.approx(0.02, rel=0.05)
  assert np.linalg.norm(a) == pytest.approx(np.linalg.norm(b), rel=0.05)


def test_the_first_values_of_sltrain():
  params = SparseFactoredDense(300, 40).init(jax.random.key(0), np.zeros((1, 100), np.float32))["params"]
  assert not np.any(params["lora_b"])
  for name in ("lora_a", "sparse_values"):
    values = np.asarray(params[name])
    assert 0.099 < values.max() <= 0.1 and -0.1 <= values.min() < -0.099 and abs(values.mean()) < 0.01
  assert not np.array_equal(params["lora_a"].ravel()[:900], params["sparse_values"])


def test_the_support_is_a_uniform_draw_without_replacement():
  """Each of the 84 positions is in 20% of 300 drawn supports; five standard deviations are 0.115."""
  support = jax.jit(jax.vmap(lambda key: draw_support(key, IN, OUT, 0.2)))(jax.random.split(jax.random.key(1), 300))
  support = np.asarray(support)
  assert support.dtype == np.int32 and support.shape == (300, 17) and support_size(IN, OUT, 0.2) == 17
  assert np.all(np.diff(support, axis=1) > 0), "unique and ascending"
  assert support.min() == 0 and support.max() == IN * OUT - 1
  share = np.bincount(support.ravel(), minlength=IN * OUT) / 300
  assert np.all(np.abs(share - 17 / 84) < 0.115)
  assert support_size(3, 3, 0.01) == 1 and support_size(IN, OUT, 1.0) == IN * OUT


# --- refactorised factors -----------------------------------------------------------------------------------------


def test_refactored_factors_are_those_of_the_dense_decomposition(x64):
  """Up to the signs of the singular vectors, of which a pair of rows has one."""
  a, b = normal(0, RANK, IN), normal(1, RANK, OUT)
  new_a, new_b = map(np.asarray, refactored(a, b))
  left, values, right = np.linalg.svd(a.T @ b)
  root = np.sqrt(values[:RANK, None])
  signs = np.sign(np.sum(new_a * left.T[:RANK], 1))[:, None]
  np.testing.assert_allclose(new_a, signs * root * left.T[:RANK], rtol=0, atol=1e-12)
  np.testing.assert_allclose(new_b, signs * root * right[:RANK], rtol=0, atol=1e-12)
  np.testing.assert_allclose(new_a.T @ new_b, a.T @ b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("broken", ["zero", "nan"])
def test_factors_that_cannot_be_decomposed_stay_as_they_are(broken):
  a, b = normal(0, RANK, IN).astype(np.float32), normal(1, RANK, OUT).astype(np.float32)
  b *= {"zero": np.float32(0), "nan": np.float32(np.nan)}[broken]
  new = refactored(a, b)
  np.testing.assert_array_equal(new[0], a)
  np.testing.assert_array_equal(new[1], b)


def test_bfloat16_factors_are_decomposed_in_float32():
  a, b = (normal(i, RANK, size).astype(jnp.bfloat16) for i, size in enumerate((IN, OUT)))
  new_a, new_b = refactored(a, b)
  assert new_a.dtype == new_b.dtype == jnp.bfloat16
  product = lambda a, b: np.asarray(a, np.float64).T @ np.asarray(b, np.float64)
  error = product(new_a, new_b) - product(a, b)
  assert np.linalg.norm(error) < 2**-8 * np.linalg.norm(product(a, b))


def test_the_best_factors_are_the_truncated_decomposition(x64):
  kernel = normal(3, IN, OUT)
  a, b = map(np.asarray, best_factors(kernel, RANK, 0.5))
  values = np.linalg.svd(kernel, compute_uv=False)
  assert np.linalg.norm(0.5 * a.T @ b - kernel) == pytest.approx(np.sqrt(np.sum(values[RANK:] ** 2)), rel=1e-12)
  np.testing.assert_allclose(np.linalg.norm(a, axis=1), np.sqrt(values[:RANK] / 0.5), rtol=1e-12)
  np.testing.assert_allclose(np.linalg.norm(b, axis=1), np.sqrt(values[:RANK] / 0.5), rtol=1e-12)
