"""Kinds of layers: merged kernels compute the layer's function; plain kernels are stored exactly or approximated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sparse_kernels import low_rank_beside_support

from switchlora_jax.lowrank.factored import FactoredDense, SparseFactoredDense, low_rank_kernel
from switchlora_jax.lowrank.kinds import BASE, LOW, SPARSE, kind_of, linear_layers
from switchlora_jax.lowrank.layers import LoRADense

IN, OUT, RANK = 12, 7, 3
LAYERS = {
  "base": (LoRADense(OUT, RANK, 2.0, dtype=jnp.float64, param_dtype=jnp.float64), BASE),
  "sparse": (SparseFactoredDense(OUT, RANK, 2.0, jnp.float64, jnp.float64, density=0.2), SPARSE),
  "low": (FactoredDense(OUT, RANK, 2.0, jnp.float64, jnp.float64), LOW),
}
each = pytest.mark.parametrize("name", LAYERS)
NEAR = dict(rtol=0, atol=1e-12)


def layer_and_arrays(name):
  """A layer, its variables with random factors, and its arrays by name."""
  layer, _ = LAYERS[name]
  variables = layer.init(jax.random.key(0), np.zeros((1, IN)))
  rng = np.random.default_rng(0)
  params = {name: rng.standard_normal(x.shape) for name, x in sorted(variables["params"].items())}
  variables = variables | {"params": params}
  frozen = {"q": variables["frozen"]} if "frozen" in variables else {}
  (arrays,) = linear_layers({"q": params, "norm": {"scale": rng.standard_normal(3)}}, frozen).values()
  return layer, variables, arrays


@each
def test_the_merged_kernel_computes_the_function_of_the_layer(name, x64):
  layer, variables, arrays = layer_and_arrays(name)
  assert kind_of(arrays) is LAYERS[name][1]
  kernel = kind_of(arrays).merged(arrays, layer.scale)
  np.testing.assert_allclose(layer.apply(variables, np.eye(IN)), kernel, **NEAR)


@each
def test_a_stack_is_merged_and_stored_like_its_layers(name, x64):
  layer, _, arrays = layer_and_arrays(name)
  kernel, kind = np.random.default_rng(1).standard_normal((IN, OUT)), kind_of(arrays)
  stack = lambda x: jnp.stack([x, x]) if x.dtype == jnp.int32 else jnp.stack([x, 2 * x])
  stacked, kernels = jax.tree.map(stack, arrays), stack(kernel)
  merged, stored = kind.merged(stacked, layer.scale), kind.stored(kernels, stacked, layer.scale)
  for index in range(2):
    one = jax.tree.map(lambda x: x[index], stacked)  # noqa: B023
    np.testing.assert_allclose(merged[index], kind.merged(one, layer.scale), **NEAR)
    for key, expected in kind.stored(kernels[index], one, layer.scale).items():
      np.testing.assert_allclose(stored[key][index], expected, **NEAR)


@each
def test_a_stored_kernel_is_exact_or_the_best_that_the_layer_can_store(name, x64):
  """The best of rank r by NumPy; with a sparse part the error at its support is 0."""
  layer, _, arrays = layer_and_arrays(name)
  kernel, kind = np.random.default_rng(1).standard_normal((IN, OUT)), kind_of(arrays)
  stored = kind.stored(kernel, arrays, layer.scale)
  assert {n: (x.shape, x.dtype) for n, x in stored.items()} == {n: (x.shape, x.dtype) for n, x in arrays.items()}
  left, values, right = np.linalg.svd(kernel, full_matrices=False)
  expected = kernel if kind.exact else (left[:, :RANK] * values[:RANK]) @ right[:RANK]
  if kind is SPARSE:
    support = np.asarray(arrays["sparse_support"])
    expected = low_rank_beside_support(kernel, support, RANK)
    np.testing.assert_array_equal(stored["sparse_support"], support)
    expected.ravel()[support] = kernel.ravel()[support]
  np.testing.assert_allclose(kind.merged(stored, layer.scale), expected, **NEAR)
  assert kind.exact == (name == "base")


@pytest.mark.parametrize("same", [True, False])
def test_a_kernel_of_a_layer_with_the_same_support_is_recovered(same, x64):
  """With another support, the error falls against the truncated singular value decomposition."""
  shape, rank = (48, 64), 8
  layer = SparseFactoredDense(shape[1], rank, 2.0, jnp.float64, jnp.float64, density=0.03)
  arrays, others = ({**v["params"], **v["frozen"]} for v in (layer.init(jax.random.key(i), np.eye(48)) for i in (0, 1)))
  rng = np.random.default_rng(0)
  source = others | {name: rng.standard_normal(others[name].shape) for name in ("lora_a", "lora_b", "sparse_values")}
  source["sparse_values"] *= 5
  kernel = SPARSE.merged(source, layer.scale)
  target = others if same else arrays
  error = lambda arrays: np.linalg.norm(SPARSE.merged(arrays, layer.scale) - kernel) / np.linalg.norm(kernel)
  stored = SPARSE.stored(kernel, target, layer.scale)
  once = LOW.stored(kernel, target, layer.scale)
  lacks = (kernel - low_rank_kernel(once["lora_a"], once["lora_b"], layer.scale)).ravel()[target["sparse_support"]]
  once = once | {"sparse_values": lacks}
  if same:
    assert error(stored) < 1e-6 < 0.05 < error(once)
  else:
    assert error(stored) < 0.99 * error(once)
  np.testing.assert_allclose(*(np.linalg.norm(stored[name]) for name in ("lora_a", "lora_b")), rtol=1e-10)
