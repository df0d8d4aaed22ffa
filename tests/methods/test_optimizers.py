"""The optimizers of `config.optimizer`, compared with NumPy or Optax, and the config keys that select them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_model
from small_model import host

from switchlora_jax.errors import UserError
from switchlora_jax.lowrank.layers import lora_vectors
from switchlora_jax.methods import METHODS, full_rank_config, optimizers
from switchlora_jax.methods.optimizers import MUON_RMS, OPTIMIZERS, make_optimizer

pytestmark = pytest.mark.user_flags

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic Newton-Schulz iteration (Keller Jordan)


def draw(seed):
  """A tree like the parameters of two stacked layers [3, 5] and [6, 4], their norm, an embedding and a head."""
  normal = np.random.default_rng(seed).standard_normal
  blocks = {
    "q": {"kernel": normal((2, 3, 5))},
    "down": {"kernel": normal((2, 6, 4))},
    "norm": {"scale": normal((2, 3))},
  }
  return {"blocks": blocks, "embed": {"embedding": normal((7, 3))}, "head": {"kernel": normal((3, 7))}}


def directions(tx, steps):
  """The host directions of so many jitted updates with random gradients, and the last state."""
  update, found = jax.jit(tx.update), []
  state = jax.jit(tx.init)(draw(0))
  for t in range(steps):
    direction, state = update(draw(t + 1), state)
    found.append(host(direction))
  return found, host(state)


def orthogonalised(matrix):
  x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
  x = x / (np.linalg.norm(x) + 1e-8)
  a, b, c = NS_COEFFICIENTS
  for _ in range(5):
    gram = x @ x.T
    x = a * x + (b * gram + c * gram @ gram) @ x
  return x if matrix.shape[0] <= matrix.shape[1] else x.T


def muon_reference(grads, momentum):
  """Directions of Muon for one matrix: Nesterov momentum with corrected bias, orthogonalised, scaled."""
  mean, found = np.zeros_like(grads[0]), []
  for t, grad in enumerate(grads, 1):
    mean = momentum * mean + (1 - momentum) * grad
    ahead = momentum * mean / (1 - momentum ** (t + 1)) + (1 - momentum) * grad / (1 - momentum**t)
    found.append(MUON_RMS * max(grad.shape) ** 0.5 * orthogonalised(ahead))
  return found


@pytest.mark.parametrize("layer", ["q", "down"])
def test_muon_is_the_numpy_reference_on_linear_layers_and_adam_elsewhere(x64, layer):
  config = small_model.config("full", optimizer__name="muon", param_dtype="float64")
  found, _ = directions(make_optimizer(config), 20)
  for number in range(2):
    grads = [draw(t + 1)["blocks"][layer]["kernel"][number] for t in range(20)]
    ours = [direction["blocks"][layer]["kernel"][number] for direction in found]
    np.testing.assert_allclose(ours, muon_reference(grads, 0.95), rtol=1e-10, atol=1e-12)
  adam, _ = directions(optax.scale_by_adam(), 20)
  for part in ("embed", "head"):
    for ours, theirs in zip(found, adam, strict=True):
      jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12), ours[part], theirs[part])
  norms = [[d["blocks"]["norm"]["scale"] for d in run] for run in (found, adam)]
  np.testing.assert_allclose(*norms, rtol=1e-12)


REFERENCES = {
  "adam": optax.scale_by_adam(0.8, 0.95, 1e-5),
  "lion": optax.scale_by_lion(0.8, 0.95),
  "sgd": optax.trace(0.8),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_the_coefficients_of_the_config_reach_the_optimizer(x64, name):
  keys = [key for key, value in OPTIMIZERS[name]._asdict().items() if value is not None]
  values = {f"optimizer__{key}": {"b1": 0.8, "b2": 0.95, "eps": 1e-5}[key] for key in keys}
  config = small_model.config("full", optimizer__name=name, param_dtype="float64", **values)
  ours, theirs = (directions(tx, 5)[0] for tx in (make_optimizer(config), REFERENCES[name]))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12), ours, theirs)


@pytest.mark.parametrize("method", METHODS)
def test_stored_moments_have_the_dtype_of_the_config(method):
  wide, narrow = (
    METHODS[method].build(small_model.config(method, optimizer__b2=0.9, optimizer__moments_dtype=dtype)).optimizer
    for dtype in ("float32", "bfloat16")
  )
  params = {"blocks": {"q": {"kernel": jnp.ones((1, 6, 8))}}}
  leaves = lambda tx: jax.tree.leaves(jax.eval_shape(tx.init, params))
  kinds = lambda tx: {x.dtype for x in leaves(tx) if jnp.issubdtype(x.dtype, jnp.floating) and x.ndim > 1}
  assert kinds(wide) == {np.dtype("float32")} and np.dtype(jnp.bfloat16) in kinds(narrow)


@pytest.mark.parametrize("name", ["adam", "muon", "lion", "sgd"])
def test_directions_with_narrow_moments_are_close(name):
  make = lambda dtype: make_optimizer(
    small_model.config("full", optimizer__name=name, optimizer__b1=0.9, optimizer__moments_dtype=dtype)
  )
  wide, narrow = (directions(make(dtype), 4)[0] for dtype in (None, "bfloat16"))
  for ours, theirs in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
    same_sign = np.mean(np.sign(ours) == np.sign(theirs))
    assert ours.dtype == np.float32 and same_sign > 0.9
    if name != "lion":
      np.testing.assert_allclose(ours, theirs, rtol=0.1, atol=0.1 * np.abs(theirs).max())


def test_second_moments_that_cannot_decay_are_warned_of():
  warned = lambda **changes: optimizers.warnings(small_model.config("full", **changes))
  narrow = {"optimizer__moments_dtype": "bfloat16"}
  assert len(warned(**narrow)) == len(warned(param_dtype="bfloat16")) == 1
  assert warned() == warned(**narrow, optimizer__b2=0.99) == warned(**narrow, optimizer__name="lion") == []
  moment = jnp.asarray(1.0, jnp.bfloat16)
  assert moment * jnp.bfloat16(0.999) == moment, "the case that the warning is about"


def test_a_weight_decay_that_bfloat16_weights_round_away_is_warned_of():
  warned = lambda **changes: [
    text for text in optimizers.warnings(small_model.config("full", optimizer__b2=0.9, **changes)) if "weights" in text
  ]
  decaying = dict(optimizer__weight_decay=0.1, learning_rate=1e-2)
  assert len(warned(param_dtype="bfloat16", **decaying)) == 1
  assert warned(**decaying) == warned(param_dtype="bfloat16") == []
  assert warned(param_dtype="bfloat16", optimizer__weight_decay=1.0, learning_rate=1e-2) == []


@pytest.mark.parametrize("method", ["full", "relora", "lora", "switchlora"])
def test_only_lora_and_switchlora_count_per_element(method):
  """As before the optimizer was a key; a checkpoint has the shapes of the counts."""
  params = {"blocks": {"q": {"lora_a": jnp.ones((2, 3, 5))}}, "head": {"kernel": jnp.ones((5, 4))}}
  tx = METHODS[method].build(small_model.config(method, count_per_element=True)).optimizer
  shapes = {x.shape for x in jax.tree.leaves(jax.eval_shape(tx.init, params).count)}
  assert shapes == ({(2, 3, 5), (5, 4)} if method in ("lora", "switchlora") else {()})


MISTAKES = {
  "unknown": (dict(optimizer__name="adamw"), "optimizer.name (='adamw') must be one of adam, muon, lion, sgd; set"),
  "switchlora, muon": (
    dict(method="switchlora", optimizer__name="muon"),
    "optimizer.name (='muon') is not supported by --config.method=switchlora, which supports adam; set "
    "--config.optimizer.name=adam",
  ),
  "relora, sgd": (dict(method="relora", optimizer__name="sgd"), "is not supported by --config.method=relora"),
  "galore, lion": (dict(method="galore", optimizer__name="lion"), "is not supported by --config.method=galore"),
  "b2 of sgd": (dict(optimizer__name="sgd", optimizer__b2=0.9), "optimizer.b2 (=0.9) is not a coefficient of sgd"),
  "eps of lion": (dict(optimizer__name="lion", optimizer__eps=1e-8), "optimizer.eps (=1e-08) is not a coefficient"),
  "b1": (dict(optimizer__b1=1.0), "optimizer.b1 (=1.0) must be at least 0 and less than 1; set"),
  "eps": (dict(optimizer__eps=0.0), "optimizer.eps (=0.0) must be greater than 0; set"),
  "decay": (dict(optimizer__weight_decay=-0.1), "optimizer.weight_decay (=-0.1) must not be negative; set"),
  "dtype": (dict(optimizer__moments_dtype="float16"), "optimizer.moments_dtype (='float16') must be bfloat16 or that"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_an_invalid_optimizer_raises_an_error_with_a_remedy(name):
  changes, sentence = MISTAKES[name]
  config = small_model.config(**dict(method="full") | changes, fill=False)
  with pytest.raises(UserError) as caught:
    optimizers.check(config, METHODS[config.method].ACCEPTED)
  assert sentence in str(caught.value)


def test_a_warm_start_has_the_coefficients_of_full_rank_unless_they_are_set():
  start = lambda **changes: full_rank_config(small_model.config("galore", warm_start_steps=3, **changes)).optimizer
  assert (start().eps, start(optimizer__eps=1e-4).eps) == (1e-8, 1e-4)


def test_counts_are_per_vector_in_lora_with_any_optimizer_that_has_adam():
  params = {"blocks": {"q": {"lora_a": jnp.ones((2, 3, 5))}}}
  config = small_model.config("lora")
  assert make_optimizer(config, lora_vectors).init(params).count["blocks"]["q"]["lora_a"].shape == (2, 3, 1)
