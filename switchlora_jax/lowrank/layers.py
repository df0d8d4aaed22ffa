"""Linear layers of SwitchLoRA (arXiv 2406.06564): a frozen base kernel and a trainable low-rank adapter.

The arrays of a layer are in three collections:

  params      lora_a [r, in], lora_b [r, out]: the LoRA vectors, one per row. `jax.grad` sees only these.
  frozen      kernel [in, out]: the base kernel, which gets no gradient. In int8 it has kernel_scale [in, 1]. Where it
              is stored in 16 or 8 bits and the method changes it, also kernel_tail [in, out], its int8 residual, which
              the forward pass does not read; see `kernel_storage`.
  candidates  spare_a [c - r, in], spare_b [c - r, out], timer_a [r], timer_b [r], cursor [], with c = min(in, out).
              `init` creates them; `apply` does not need them. Layers with fresh candidates have no spares, and layers
              whose vectors are not switched in sequential order also have age_a [r] and age_b [r].

In the notation of the paper, `y = (W + s·B·A) x` (eq. 4), `kernel` is Wᵀ, `lora_a` is A and `lora_b` is Bᵀ.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from switchlora_jax.lowrank.kernel_storage import KERNEL, SCALE, forward_kernel, store_new

LORA_A, LORA_B = ADAPTER = ("lora_a", "lora_b")  # the names of a layer's LoRA factors in `params`
GAIN = 3**-0.5  # of every layer, as in the authors' code; in the paper the gain "depends on the activation"
KERNEL_STD = 0.02
KERNEL_INIT = nn.initializers.normal(KERNEL_STD)
INITS = ("switchlora", "lora")
STORED, FRESH = CANDIDATES = ("stored", "fresh")  # candidates that are kept, or drawn when they are loaded


def adapter_scale(rank: int, alpha: float = 1.0) -> float:
  """s = α/r, the factor of B·A in the layer (eq. 4)."""
  return alpha / rank


def adapter_std(in_features: int, out_features: int, rank: int, init: str = "switchlora") -> tuple[float, float]:
  """Standard deviations of the elements of A and of B, spares included.

  Args:
    init: `switchlora` is eq. 3 with `√m·r` in place of its `√(m·r)`, because eq. 14 holds only then. `lora` is the
      usual initialisation, used in Fig. 9: A uniform in ±1/√in, B zero.
  Raises:
    ValueError: the rank is below 1 or the initialisation does not exist.
  """
  if rank < 1 or init not in INITS:
    raise ValueError(f"rank (={rank}) must be at least 1 and init (={init!r}) one of {', '.join(INITS)}")
  n, m = in_features, out_features
  if init == "lora":
    return GAIN / n**0.5, 0.0
  return (m**0.5 * rank / n**1.5) ** 0.25 * GAIN**0.5, (rank / (m * n) ** 0.5) ** 0.25 * GAIN**0.5


def draw_vectors(key, std: float, shape, dtype):
  """Random vectors, uniform with mean 0 and standard deviation `std`, as in the authors' code."""
  bound = 3**0.5 * std
  return jax.random.uniform(key, shape, dtype, -bound, bound)


def merge(kernel, lora_a, lora_b, scale, dtype=None):
  """The merged weight `kernel + scale·AᵀB`, [..., in, out], in the wider of the kernel's dtype and `dtype`.

  Args:
    kernel: [..., in, out].
    lora_a: [..., r, in].
    lora_b: [..., r, out].
    scale: s = α/r.
    dtype: the factors are cast to it before they are multiplied; None: the wider of their and the kernel's dtype.
  """
  dtype = dtype or jnp.promote_types(kernel.dtype, lora_a.dtype)
  wide = jnp.promote_types(kernel.dtype, dtype)
  return kernel + scale * jnp.matmul(lora_a.mT.astype(dtype), lora_b.astype(dtype), preferred_element_type=wide)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def merged_dense(x, stored, lora_a, lora_b, scale):
  """`x · (kernel + scale·AᵀB)` for x [..., in]; returns [..., out] in x's dtype.

  `stored` is {"kernel": [in, out]}, with its scale if the kernel is in int8. No copy of it in a wider dtype is kept.

  The forward and the backward pass each multiply once with the merged weight. With P base weights and p adapter
  weights this takes 4P + 4p operations per token; the usual `x·W + s·(x·Aᵀ)·B` takes 4P + 6p, full rank 6P.
  The backward pass recomputes the merged weight instead of storing it. `stored` gets no gradient.
  """
  return x @ merge(forward_kernel(stored), lora_a, lora_b, scale, x.dtype).astype(x.dtype)


def _forward(x, stored, lora_a, lora_b, scale):
  return merged_dense(x, stored, lora_a, lora_b, scale), (x, stored, lora_a, lora_b)


def _backward(scale, residuals, dy):
  x, stored, lora_a, lora_b = residuals
  weight = merge(forward_kernel(stored), lora_a, lora_b, scale, x.dtype).astype(x.dtype)
  dx = dy @ weight.T
  flat_x, flat_dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])  # [tokens, in], [tokens, out]
  scaled_dy = scale * (flat_dy @ lora_b.T.astype(x.dtype))  # [tokens, r]
  scaled_x = scale * (flat_x @ lora_a.T.astype(x.dtype))  # [tokens, r]
  d_a = jnp.matmul(scaled_dy.T, flat_x, preferred_element_type=lora_a.dtype)  # eq. 6
  d_b = jnp.matmul(scaled_x.T, flat_dy, preferred_element_type=lora_b.dtype)  # eq. 5
  return dx, None, d_a, d_b


merged_dense.defvjp(_forward, _backward)


class LoRADense(nn.Module):
  """A linear layer without bias, with a frozen base kernel and a trainable adapter of rank r.

  The kernel is initialised as `nn.Dense` with the same key would initialise it, minus `scale·AᵀB`. At step 0 the
  layer therefore computes the same function as that `nn.Dense`.

  Attributes:
    features: number of outputs.
    rank: r, the number of LoRA vectors per factor.
    alpha: the adapter is scaled by `alpha / rank`.
    adapter_init: `switchlora` (eq. 3) or `lora` (A uniform in ±1/√in, B zero).
    dtype: dtype of the computation.
    param_dtype: dtype of the stored arrays.
    frozen_dtype: dtype of the stored kernel, also int8; None: `param_dtype`.
    kernel_residual: whether a kernel narrower than `param_dtype` is stored with an int8 residual. Methods that change
      the kernel need it, because a kernel that is rounded to 8 bits after each change drifts.
  """

  features: int
  rank: int
  alpha: float = 1.0
  adapter_init: str = "switchlora"
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  frozen_dtype: Any = None
  kernel_residual: bool = False

  @property
  def scale(self) -> float:
    """s = α/r."""
    return adapter_scale(self.rank, self.alpha)

  @nn.compact
  def __call__(self, x):
    """Map x [..., in] to [..., features], in `dtype`."""
    if self.is_initializing():
      for collection, values in self.initial(self.make_rng("params"), x.shape[-1]).items():
        for name, value in values.items():
          self.put_variable(collection, name, value)
    lora_a, lora_b = (self.get_variable("params", name) for name in ADAPTER)
    read = [name for name in (KERNEL, SCALE) if self.has_variable("frozen", name)]
    stored = {name: self.get_variable("frozen", name) for name in read}
    return merged_dense(x.astype(self.dtype), stored, lora_a, lora_b, self.scale)

  def initial(self, key, in_features: int) -> dict[str, dict[str, jax.Array]]:
    """The variables at step 0, {collection: {name: array}}.

    `key` itself draws the plain kernel, as in `nn.Dense`, so that all methods start from the same function at a seed.
    """
    std_a, std_b = adapter_std(in_features, self.features, self.rank, self.adapter_init)
    lora_a = self._draw(key, 1, std_a, (self.rank, in_features))
    lora_b = self._draw(key, 2, std_b, (self.rank, self.features))
    plain = KERNEL_INIT(key, (in_features, self.features), self.param_dtype)
    kernel, dtype = merge(plain, lora_a, lora_b, -self.scale), jnp.dtype(self.frozen_dtype or self.param_dtype)
    frozen = store_new(kernel, dtype, self.kernel_residual)
    return {"params": {LORA_A: lora_a, LORA_B: lora_b}, "frozen": frozen}

  def _draw(self, key, number: int, std: float, shape):
    return draw_vectors(jax.random.fold_in(key, number), std, shape, self.param_dtype)


class SwitchLoRADense(LoRADense):
  """A `LoRADense` with spare candidate vectors, which `switch` exchanges with its LoRA vectors.

  The layer works in any Flax model. `switch` exchanges vectors between `params` and `candidates` and corrects the
  frozen kernel, so that the function of the layer does not change:

  >>> import jax, jax.numpy as jnp, optax
  >>> from switchlora_jax import SwitchLoRADense, SwitchSchedule, draw_uniforms, lora_vectors, switch, vector_adam
  >>> layer = SwitchLoRADense(features=48, rank=8)
  >>> x = jax.random.normal(jax.random.key(0), (4, 32))
  >>> variables = layer.init(jax.random.key(1), x)
  >>> sorted(variables), variables["candidates"]["spare_b"].shape
  (['candidates', 'frozen', 'params'], (24, 48))
  >>> y = layer.apply({"params": variables["params"], "frozen": variables["frozen"]}, x)

  >>> schedule = SwitchSchedule(interval=2, freeze_steps=1, total_steps=100)
  >>> switched = switch(**variables, schedule=schedule, scale=layer.scale, step=0, uniforms=0.0)
  >>> int(switched.count), bool(jnp.any(switched.params["lora_a"] != variables["params"]["lora_a"]))
  (4, True)
  >>> y_after = layer.apply({"params": switched.params, "frozen": switched.frozen}, x)
  >>> bool(jnp.allclose(y, y_after, atol=1e-5))
  True

  A training step differentiates with respect to `params`, switches, and passes the masks of the switch to Adam, which
  resets and freezes the counterparts of the switched vectors. All three collections are carried to the next step:

  >>> tx = vector_adam(1e-2, vectors=lora_vectors)
  >>> def loss(params, frozen, x):
  ...   return jnp.mean((layer.apply({"params": params, "frozen": frozen}, x) - 1.0) ** 2)
  >>> @jax.jit
  ... def train_step(step, params, frozen, candidates, opt_state, x):
  ...   grads = jax.grad(loss)(params, frozen, x)
  ...   uniforms = draw_uniforms(jax.random.fold_in(jax.random.key(0), step), candidates)
  ...   s = switch(params, frozen, candidates, schedule=schedule, scale=layer.scale, step=step, uniforms=uniforms)
  ...   updates, opt_state = tx.update(grads, opt_state, s.params, reset=s.reset, freeze=s.freeze)
  ...   return optax.apply_updates(s.params, updates), s.frozen, s.candidates, opt_state
  >>> run = (variables["params"], variables["frozen"], variables["candidates"], tx.init(variables["params"]))
  >>> before = loss(run[0], run[1], x)
  >>> for step in range(100):
  ...   run = train_step(step, *run, x)
  >>> bool(loss(run[0], run[1], x) < before / 2)
  True
  """

  kernel_residual: bool = True
  candidates_dtype: Any = None  # of the spares; a vector is rounded when it becomes a spare; None: `param_dtype`
  candidates: str = STORED  # or FRESH: no spares, `switch` draws each vector that it loads
  ages: bool = False  # store the ages of the LoRA vectors, which `switching.Choice` needs

  def initial(self, key, in_features: int):
    """As `LoRADense.initial`, with the state of the switch; all c candidates of a factor have the same distribution."""
    if self.candidates not in CANDIDATES:
      raise ValueError(f"candidates (={self.candidates!r}) must be one of {', '.join(CANDIDATES)}")
    variables = super().initial(key, in_features)
    spares = min(in_features, self.features) - self.rank
    if spares <= 0:  # the layer is never switched
      return variables
    clock = {
      "timer_a": jnp.zeros(self.rank, jnp.int32),  # steps for which a vector remains frozen
      "timer_b": jnp.zeros(self.rank, jnp.int32),
      "cursor": jnp.zeros((), jnp.int32),  # number of vectors loaded so far, per factor
    }
    if self.ages:  # steps since a vector was loaded
      clock |= {"age_a": jnp.zeros(self.rank, jnp.int32), "age_b": jnp.zeros(self.rank, jnp.int32)}
    if self.candidates == FRESH:
      return variables | {"candidates": clock}
    std_a, std_b = adapter_std(in_features, self.features, self.rank, self.adapter_init)
    dtype = self.candidates_dtype or self.param_dtype
    return variables | {
      "candidates": {
        "spare_a": self._draw(key, 3, std_a, (spares, in_features)).astype(dtype),
        "spare_b": self._draw(key, 4, std_b, (spares, self.features)).astype(dtype),
        **clock,
      }
    }


def lora_vectors(params):
  """A tree of bools like `params`, true for the leaves `lora_a` and `lora_b`, whose rows are LoRA vectors."""
  return jax.tree.map_with_path(lambda path, _: path[-1].key in ADAPTER, params)
