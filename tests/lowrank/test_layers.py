"""Linear layers with adapters: initialisation, the merged forward pass, its custom backward pass."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import equations, host

from switchlora_jax.lowrank.kernel_storage import load_kernel, store_new
from switchlora_jax.lowrank.layers import (
  KERNEL_INIT,
  LoRADense,
  SwitchLoRADense,
  adapter_std,
  lora_vectors,
  merge,
  merged_dense,
)

RECORDED_LAYERS = [
  "switchlora_m24_n16_r4",
  "switchlora_m16_n24_r4",
  "switchlora_m10_n24_r3",
  "switchlora_m24_n16_r1",
  "origin_lora_m24_n16_r4",
]


def naive_dense(x, kernel, lora_a, lora_b, scale):
  """The usual two-matmul LoRA: x·W + s·(x·Aᵀ)·B."""
  return x @ kernel + scale * (x @ lora_a.T) @ lora_b


def draw(dtype=np.float64, lead=(5, 7), n=12, m=20, r=4):
  """x, kernel, lora_a, lora_b and a cotangent, standard normal."""
  rng, shapes = np.random.default_rng(0), ((*lead, n), (n, m), (r, n), (r, m), (*lead, m))
  return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


@functools.partial(jax.jit, static_argnums=0)
def vjp(dense, cotangent, *primals):
  """The output at scale 0.25, and the cotangents of x, kernel, lora_a, lora_b."""
  y, pull = jax.vjp(lambda *primals: dense(*primals, 0.25), *primals)
  return y, pull(cotangent)


@functools.cache
def start(layer, features=16, seed=0):
  """Initialises a layer for inputs of the given width; returns its variables as NumPy arrays."""
  x = np.ones((2, features), layer.param_dtype)
  return host(jax.jit(layer.init)(jax.random.key(seed), x))


def shapes(layer, features=16):
  """The shapes and dtypes of the variables that `start` returns."""
  return jax.eval_shape(layer.init, jax.random.key(0), np.ones((2, features), np.float32))


def apply(layer, variables, x):
  return np.asarray(jax.jit(layer.apply)(variables, x))


def adapted(x, kernel, lora_a, lora_b, scale):
  """`merged_dense` with a kernel that is stored as it is."""
  return merged_dense(x, {"kernel": kernel}, lora_a, lora_b, scale)


merged, dense = jax.jit(merge), jax.jit(adapted, static_argnums=4)


def test_standard_deviations_are_the_recorded_ones(golden):
  table = golden("init")[0]["table"]
  assert len(table) == 24
  for init, m, n, r, bound_a, bound_b, std_a, std_b, _ in table:
    ours = adapter_std(int(n), int(m), int(r), "lora" if init else "switchlora")
    np.testing.assert_allclose(ours, (std_a, std_b), rtol=1e-12)
    np.testing.assert_allclose(3**0.5 * np.array(ours), (bound_a, bound_b), rtol=1e-12)


def test_scale_is_the_recorded_one(golden):
  for _, m, _, r, *_, scale in golden("init")[0]["table"]:
    assert LoRADense(features=int(m), rank=int(r)).scale == scale


def test_standard_deviations_satisfy_equation_14():
  """Eq. 14: std(A)·std(B) = gain·√(r/n)."""
  std_a, std_b = adapter_std(768, 2048, 128)
  np.testing.assert_allclose(std_a * std_b, 3**-0.5 * (128 / 768) ** 0.5, rtol=1e-12)


@pytest.mark.parametrize("name", RECORDED_LAYERS)
def test_the_initial_kernel_is_the_recorded_one(name, golden, x64):
  arrays = golden("init")[0]
  plain, kernel, lora_a, lora_b = (arrays[f"{name}_{key}"].T for key in ("W0", "W", "A", "B"))
  ours = merged(plain, lora_a.T, lora_b, -1.0 / lora_b.shape[0])
  np.testing.assert_allclose(ours, kernel, rtol=0, atol=1e-12)
  assert name.startswith("origin") or np.abs(kernel - plain).max() > 1e-2


def test_vectors_and_spares_are_uniform_within_the_bound():
  variables = start(SwitchLoRADense(features=192, rank=64), 128, seed=3)
  params, candidates = variables["params"], variables["candidates"]
  std_a, std_b = adapter_std(128, 192, 64)
  arrays = [(params["lora_a"], std_a), (candidates["spare_a"], std_a)]
  arrays += [(params["lora_b"], std_b), (candidates["spare_b"], std_b)]
  for values, std in arrays:
    assert 0.99 * 3**0.5 * std < np.abs(values).max() <= 3**0.5 * std
    np.testing.assert_allclose(np.std(values), std, rtol=0.02)  # at least 8,192 numbers: 0.02 is 5 standard deviations
    np.testing.assert_allclose(np.mean(values), 0, atol=0.06 * std)
  rows = np.concatenate([values.reshape(-1)[:64][None] for values, _ in arrays])
  assert len(np.unique(rows / np.abs(rows).max(1, keepdims=True), axis=0)) == 4, "each array is drawn independently"


def test_lora_init_has_zero_b_and_zero_spares_of_b():
  variables = start(SwitchLoRADense(features=24, rank=4, adapter_init="lora"))
  assert not np.any(variables["params"]["lora_b"]) and not np.any(variables["candidates"]["spare_b"])
  for values in (variables["params"]["lora_a"], variables["candidates"]["spare_a"]):
    assert 0.9 / 16**0.5 < np.abs(values).max() <= 1 / 16**0.5
  plain = start(nn.Dense(24, use_bias=False, kernel_init=KERNEL_INIT))
  np.testing.assert_array_equal(variables["frozen"]["kernel"], plain["params"]["kernel"])


def test_forward_and_gradients_are_those_of_the_usual_two_products(x64):
  *primals, cotangent = draw()
  ours, (d_x, _, d_a, d_b) = host(vjp(adapted, cotangent, *primals))
  usual, (e_x, _, e_a, e_b) = host(vjp(naive_dense, cotangent, *primals))
  for left, right in ((ours, usual), (d_x, e_x), (d_a, e_a), (d_b, e_b)):
    np.testing.assert_allclose(left, right, rtol=0, atol=1e-12 * np.abs(right).max())


@pytest.mark.parametrize("residual", [False, True])
def test_an_int8_kernel_gives_the_output_and_the_gradients_of_its_values(residual):
  """The forward and the backward pass read int8 and scale, and not the residual."""
  x, kernel, *vectors, _ = draw(np.float32)
  stored = store_new(kernel, "int8", residual)
  read = {name: array for name, array in stored.items() if name != "kernel_tail"}
  values = np.asarray(stored["kernel"], np.float32) * np.asarray(stored["kernel_scale"])
  ours, pull = jax.vjp(lambda x, a, b: merged_dense(x, read, a, b, 0.25), x, *vectors)
  exact, exact_pull = jax.vjp(lambda x, a, b: adapted(x, values, a, b, 0.25), x, *vectors)
  for left, right in zip((ours, *pull(ours)), (exact, *exact_pull(ours)), strict=True):
    np.testing.assert_allclose(left, right, rtol=0, atol=1e-5 * np.abs(right).max())
  assert np.abs(values - kernel).max() > 1e-3
  layer = LoRADense(24, rank=4, frozen_dtype=jnp.int8, kernel_residual=residual)
  variables = start(layer)
  plain = start(LoRADense(24, rank=4))
  inputs = np.ones((3, 16), np.float32)
  np.testing.assert_allclose(apply(layer, variables, inputs), apply(LoRADense(24, rank=4), plain, inputs), atol=0.05)


def test_the_adapter_changes_the_output(x64):
  x, kernel, lora_a, lora_b, _ = draw()
  of = lambda lora_b, scale: np.asarray(dense(x, kernel, lora_a, lora_b, scale))
  with_adapter = of(lora_b, 0.25)
  assert np.abs(with_adapter - of(0 * lora_b, 0.25)).max() > 0.1
  assert np.abs(with_adapter - of(lora_b, 0.5)).max() > 0.1


def test_the_kernel_gets_no_gradient(x64):
  *primals, cotangent = draw()
  _, (_, d_kernel, _, _) = vjp(adapted, cotangent, *primals)
  assert not np.any(d_kernel)
  _, (_, usual, _, _) = vjp(naive_dense, cotangent, *primals)
  assert np.any(usual)


def test_only_the_lora_vectors_get_gradients():
  layer, x = SwitchLoRADense(features=24, rank=4), np.ones((3, 16), np.float32)
  variables = start(layer)
  loss = lambda params: layer.apply({"params": params, "frozen": variables["frozen"]}, x).sum()
  grads = jax.jit(jax.grad(loss))(variables["params"])
  assert set(grads) == {"lora_a", "lora_b"}
  assert all(np.any(g) for g in grads.values())


def test_lora_vectors_marks_the_leaves_of_adapters():
  params = {"blocks": {"q": {"lora_a": 0, "lora_b": 0}}, "head": {"kernel": 0}}
  assert lora_vectors(params) == {"blocks": {"q": {"lora_a": True, "lora_b": True}}, "head": {"kernel": False}}


def test_with_one_seed_all_layers_have_the_same_initial_function(x64):
  x, kinds = draw()[0], dict(dtype=jnp.float64, param_dtype=jnp.float64)
  plain = nn.Dense(20, use_bias=False, kernel_init=KERNEL_INIT, **kinds)
  y = apply(plain, start(plain, 12, seed=5), x)
  for layer in (LoRADense(20, 4, **kinds), SwitchLoRADense(20, 4, **kinds), LoRADense(20, 4, 2.0, "lora", **kinds)):
    variables = start(layer, 12, seed=5)
    np.testing.assert_allclose(apply(layer, variables, x), y, rtol=0, atol=1e-12 * np.abs(y).max())
    without_base = variables | {"frozen": jax.tree.map(np.zeros_like, variables["frozen"])}
    assert layer.adapter_init == "lora" or np.abs(apply(layer, without_base, x)).max() > 0.1, (
      "the adapter is 0, so the base kernel need not cancel it"
    )


def test_lora_and_switchlora_start_from_the_same_bits():
  lora, switchlora = (start(kind(24, 4), seed=1) for kind in (LoRADense, SwitchLoRADense))
  for collection in ("params", "frozen"):
    assert jax.tree.all(jax.tree.map(np.array_equal, lora[collection], switchlora[collection]))
  assert set(switchlora) - set(lora) == {"candidates"}


def test_candidates_are_not_needed_to_apply():
  layer, x = SwitchLoRADense(features=24, rank=4), np.ones((2, 16), np.float32)
  variables = start(layer)
  without = {name: variables[name] for name in ("params", "frozen")}
  np.testing.assert_array_equal(apply(layer, without, x), apply(layer, variables, x))


@pytest.mark.parametrize("rank", [16, 17])
def test_without_spares_there_is_no_candidates_collection(rank):
  variables = shapes(SwitchLoRADense(features=24, rank=rank))
  assert set(variables) == {"params", "frozen"}
  assert variables["params"]["lora_a"].shape == (rank, 16)


def test_spares_timers_and_cursor_have_their_shapes():
  candidates = shapes(SwitchLoRADense(features=24, rank=4))["candidates"]
  assert jax.tree.map(jnp.shape, candidates) == {
    "spare_a": (12, 16),
    "spare_b": (12, 24),
    "timer_a": (4,),
    "timer_b": (4,),
    "cursor": (),
  }


def test_bfloat16_inputs_give_bfloat16_outputs_and_float32_gradients_of_the_vectors():
  x, kernel, lora_a, lora_b, cotangent = draw(np.float32, lead=(32,))
  narrow = jnp.bfloat16
  ours, (d_x, _, d_a, d_b) = host(vjp(adapted, cotangent.astype(narrow), x.astype(narrow), kernel, lora_a, lora_b))
  exact, (e_x, _, e_a, e_b) = host(vjp(adapted, cotangent, x, kernel, lora_a, lora_b))
  assert (ours.dtype, d_x.dtype, d_a.dtype, d_b.dtype) == (narrow, narrow, jnp.float32, jnp.float32)
  for left, right in ((ours, exact), (d_x, e_x), (d_a, e_a), (d_b, e_b)):
    # Three or four roundings to 8 bits, each with a relative error of at most 2⁻⁹.
    error = np.linalg.norm(left.astype(np.float32) - right) / np.linalg.norm(right)
    assert 2**-12 < error < 2**-6


def test_a_layer_in_bfloat16_stores_float32():
  layer = SwitchLoRADense(features=24, rank=4, dtype=jnp.bfloat16)
  variables = start(layer)
  assert apply(layer, variables, np.ones((2, 16), np.float32)).dtype == jnp.bfloat16
  stored = jax.tree.leaves({name: variables[name] for name in ("params", "frozen")})
  assert {leaf.dtype for leaf in stored} == {jnp.dtype("float32")}


# --- a bfloat16 kernel --------------------------------------------------------------------------------------------

NARROW = dict(features=24, rank=4, frozen_dtype=jnp.bfloat16)
NARROW_LAYER = SwitchLoRADense(**NARROW)


@pytest.mark.parametrize(
  ("layer", "residual"),
  [
    (LoRADense(**NARROW), False),
    (LoRADense(**NARROW, kernel_residual=True), True),
    (SwitchLoRADense(**NARROW), True),
    (SwitchLoRADense(**NARROW, kernel_residual=False), False),
    (SwitchLoRADense(**NARROW, param_dtype=jnp.bfloat16), False),  # the adapters are no more precise than the kernel
  ],
)
def test_a_bfloat16_kernel_has_a_residual_if_the_method_changes_it(layer, residual):
  frozen = shapes(layer)["frozen"]
  kinds = {name: str(values.dtype) for name, values in frozen.items()}
  assert kinds == {"kernel": "bfloat16"} | ({"kernel_tail": "int8"} if residual else {})


def test_kernel_and_residual_add_up_to_the_float32_kernel():
  wide, narrow = (start(kind, seed=1) for kind in (SwitchLoRADense(24, 4), NARROW_LAYER))
  (kernel,) = wide["frozen"].values()
  base = narrow["frozen"]
  assert jax.tree.all(jax.tree.map(np.array_equal, wide | {"frozen": {}}, narrow | {"frozen": {}}))
  np.testing.assert_allclose(jax.jit(load_kernel)(base), kernel, rtol=2**-16)
  assert 2**-10 < np.abs(base["kernel"].astype(np.float32) / kernel - 1).max() < 2**-7


def test_the_residual_does_not_affect_the_output():
  x = draw(np.float32, n=16)[0]
  variables = start(NARROW_LAYER, seed=1)
  y = apply(NARROW_LAYER, variables, x)
  lora_a, lora_b = (variables["params"][name] for name in ("lora_a", "lora_b"))
  kernel, joined = variables["frozen"]["kernel"].astype(np.float32), jax.jit(load_kernel)(variables["frozen"])
  np.testing.assert_array_equal(y, dense(x, kernel, lora_a, lora_b, NARROW_LAYER.scale))
  assert np.abs(y - np.asarray(dense(x, joined, lora_a, lora_b, NARROW_LAYER.scale))).max() > 1e-5
  other = variables["frozen"] | {"kernel_tail": ~variables["frozen"]["kernel_tail"]}
  np.testing.assert_array_equal(apply(NARROW_LAYER, variables | {"frozen": other}, x), y)


def shapes_in(jaxpr) -> set:
  """(dtype, shape) of every value computed in a jaxpr."""
  return {(str(out.aval.dtype), out.aval.shape) for equation in equations(jaxpr) for out in equation.outvars}


@pytest.mark.parametrize(("frozen_dtype", "widens"), [(jnp.bfloat16, False), (jnp.float32, True)])
def test_a_bfloat16_computation_does_not_widen_a_bfloat16_kernel_to_float32(frozen_dtype, widens):
  layer = SwitchLoRADense(24, 4, dtype=jnp.bfloat16, frozen_dtype=frozen_dtype)
  x = np.ones((2, 16), jnp.bfloat16)
  variables = start(layer)
  loss = lambda params, x: layer.apply({"params": params, "frozen": variables["frozen"]}, x).astype(jnp.float32).sum()
  jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(variables["params"], x).jaxpr
  assert ("bfloat16", (16, 24)) in shapes_in(jaxpr)
  assert (("float32", (16, 24)) in shapes_in(jaxpr)) == widens


def test_a_bfloat16_kernel_is_merged_in_the_dtype_of_the_adapter():
  _, kernel, lora_a, lora_b, _ = draw(np.float32)
  rounded = kernel.astype(jnp.bfloat16)
  narrow = merged(rounded, lora_a, lora_b, 0.25)
  assert narrow.dtype == jnp.float32
  np.testing.assert_array_equal(narrow, merged(rounded.astype(np.float32), lora_a, lora_b, 0.25))


def scan_outputs(jaxpr) -> set[tuple[int, ...]]:
  """Shapes of the outputs of all scans in a jaxpr."""
  return {out.aval.shape for e in equations(jaxpr) if e.primitive.name == "scan" for out in e.outvars}


def usual_backward(x, kernel, lora_a, lora_b, scale):
  """The merged forward pass with JAX's own backward pass, which saves the merged weight."""
  return x @ merge(kernel, lora_a, lora_b, scale)


def of_int8(x, kernel, scales, lora_a, lora_b, scale):
  """`merged_dense` with a kernel in int8."""
  return merged_dense(x, {"kernel": kernel, "kernel_scale": scales}, lora_a, lora_b, scale)


@pytest.mark.parametrize("dense, stacked", [(adapted, False), (of_int8, False), (usual_backward, True)])
def test_a_scan_over_layers_stacks_no_second_copy_of_the_weights(dense, stacked):
  """What a scan saves for its backward pass is among its outputs: none has the shape [layers, in, out]."""
  layers, size, rank = 3, 16, 4

  def loss(params, frozen, x):
    body = lambda x, layer: (jnp.tanh(dense(x, *layer, 0.25)), None)
    return jax.lax.scan(body, x, (*frozen, *params))[0].sum()

  ones = lambda *shape, dtype=np.float32: np.ones(shape, dtype)
  params = (ones(layers, rank, size), ones(layers, rank, size))
  frozen = [ones(layers, size, size)]
  if dense is of_int8:
    frozen = [ones(layers, size, size, dtype=np.int8), ones(layers, size, 1)]
  jaxpr = jax.make_jaxpr(jax.grad(loss))(params, frozen, ones(5, size)).jaxpr
  shapes = scan_outputs(jaxpr)
  assert (layers, rank, size) in shapes, "the gradients of the vectors are outputs"
  assert ((layers, size, size) in shapes) == stacked


@pytest.mark.parametrize("wrong", [dict(rank=0), dict(rank=4, adapter_init="kaiming")])
def test_an_invalid_rank_or_initialisation_raises(wrong):
  with pytest.raises(ValueError, match="must be at least 1 and init"):
    start(SwitchLoRADense(6, **wrong))


def test_an_unknown_kind_of_candidates_raises():
  with pytest.raises(ValueError, match=r"^candidates \(='Fresh'\) must be one of stored, fresh"):
    start(SwitchLoRADense(6, rank=4, candidates="Fresh"))
