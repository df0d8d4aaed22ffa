"""Linear layers with a frozen base and a trained low-rank adapter.

Three collections keep apart what is trained, what is not, and what waits its turn:

  params      lora_a [r, in], lora_b [r, out]: the LoRA vectors, one a row
  frozen      kernel [in, out]: the base weight; never differentiated. Where it is stored in 16 bits by a method that
              changes it, kernel_tail [in, out]: the next 8 bits, which the forward pass does not read
  candidates  spare_a [c - r, in], spare_b [c - r, out], timer_a [r], timer_b [r], cursor []
              with c = min(in, out); created by `init` and not needed by `apply`

Against the paper's `y = (W + s·B·A) x` (eq. 4), `kernel` is Wᵀ, `lora_a` is A and `lora_b` is Bᵀ.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from switchlora_jax.lowrank.kernel_storage import split

GAIN = 3**-0.5  # for every layer: the text's "depends on the activation" is not what the authors' code does
KERNEL_INIT = nn.initializers.normal(0.02)
INITS = ("switchlora", "lora")


def adapter_scale(rank: int, alpha: float = 1.0) -> float:
  """s = α/r, by which the product of A and B is scaled."""
  return alpha / rank


def adapter_std(in_features: int, out_features: int, rank: int, init: str = "switchlora") -> tuple[float, float]:
  """Standard deviations of the vectors of A and of B, spares included.

  `switchlora` is eq. 3 with `√m·r` for its `√(m·r)`, without which eq. 14 does not hold; `lora` is
  the traditional one of Fig. 9: A uniform in ±1/√in, B zero.

  Raises:
    ValueError: no such rank or initialisation.
  """
  if rank < 1 or init not in INITS:
    raise ValueError(f"rank (={rank}) must be at least 1 and init (={init!r}) one of {', '.join(INITS)}")
  n, m = in_features, out_features
  if init == "lora":
    return GAIN / n**0.5, 0.0
  return (m**0.5 * rank / n**1.5) ** 0.25 * GAIN**0.5, (rank / (m * n) ** 0.5) ** 0.25 * GAIN**0.5


def merge(kernel, lora_a, lora_b, scale, dtype=None):
  """The weight in force, `kernel + scale·AᵀB`, [..., in, out], in the wider of the kernel's dtype and `dtype`.

  The product's factors are cast to `dtype` first (by default the wider of theirs and the kernel's).
  """
  dtype = dtype or jnp.promote_types(kernel.dtype, lora_a.dtype)
  wide = jnp.promote_types(kernel.dtype, dtype)
  return kernel + scale * jnp.matmul(lora_a.mT.astype(dtype), lora_b.astype(dtype), preferred_element_type=wide)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def merged_dense(x, kernel, lora_a, lora_b, scale):
  """`x · (kernel + scale·AᵀB)` for x [..., in]; returns [..., out] in x's dtype.

  One product with the merged weight forward and one backward: 4P + 4p operations a token for P
  weights and p adapter weights, where the usual `x·W + s·(x·Aᵀ)·B` takes 4P + 6p and full rank 6P.
  The merged weight is recomputed in the backward pass rather than kept. `kernel` gets no gradient.
  """
  return x @ merge(kernel, lora_a, lora_b, scale, x.dtype).astype(x.dtype)


def _forward(x, kernel, lora_a, lora_b, scale):
  return merged_dense(x, kernel, lora_a, lora_b, scale), (x, kernel, lora_a, lora_b)


def _backward(scale, residuals, dy):
  x, kernel, lora_a, lora_b = residuals
  weight = merge(kernel, lora_a, lora_b, scale, x.dtype).astype(x.dtype)
  dx = dy @ weight.T
  rows_x, rows_dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])  # [tokens, in], [tokens, out]
  scaled_dy = scale * (rows_dy @ lora_b.T.astype(x.dtype))  # [tokens, r]
  scaled_x = scale * (rows_x @ lora_a.T.astype(x.dtype))  # [tokens, r]
  d_a = jnp.matmul(scaled_dy.T, rows_x, preferred_element_type=lora_a.dtype)  # eq. 6
  d_b = jnp.matmul(scaled_x.T, rows_dy, preferred_element_type=lora_b.dtype)  # eq. 5
  return dx, None, d_a, d_b


merged_dense.defvjp(_forward, _backward)


class LoRADense(nn.Module):
  """A linear layer without bias whose base is frozen and whose rank-r adapter is trained.

  At initialisation `kernel` is what the plain layer would have drawn from the same key, minus
  `scale·AᵀB`: the function at step 0 is the plain layer's.

  Attributes:
    features: outputs.
    rank: r, the number of LoRA vectors a side.
    alpha: the adapter is scaled by `alpha / rank`.
    adapter_init: `switchlora` (eq. 3) or `lora` (A uniform in ±1/√in, B zero).
    dtype: of the computation; `param_dtype`: of everything stored.
    frozen_dtype: of the kernel; None: `param_dtype`.
    kernel_tail: keep the next 8 bits beside a kernel narrower than `param_dtype`: for methods that change kernels,
      which would drift if each change were rounded to 16 bits.
  """

  features: int
  rank: int
  alpha: float = 1.0
  adapter_init: str = "switchlora"
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  frozen_dtype: Any = None
  kernel_tail: bool = False

  @property
  def scale(self) -> float:
    """s = α/r."""
    return adapter_scale(self.rank, self.alpha)

  @nn.compact
  def __call__(self, x):
    """x [..., in] to [..., features], in `dtype`."""
    if self.is_initializing():
      for collection, values in self.initial(self.make_rng("params"), x.shape[-1]).items():
        for name, value in values.items():
          self.put_variable(collection, name, value)
    lora_a, lora_b = self.get_variable("params", "lora_a"), self.get_variable("params", "lora_b")
    kernel = self.get_variable("frozen", "kernel")
    return merged_dense(x.astype(self.dtype), kernel, lora_a, lora_b, self.scale)

  def initial(self, key, in_features: int) -> dict[str, dict[str, jax.Array]]:
    """The variables at step 0, {collection: {name: array}}.

    The plain kernel takes `key` itself, as nn.Dense would: at one seed all methods start from one function.
    """
    std_a, std_b = adapter_std(in_features, self.features, self.rank, self.adapter_init)
    lora_a = self._draw(key, 1, std_a, (self.rank, in_features))
    lora_b = self._draw(key, 2, std_b, (self.rank, self.features))
    plain = KERNEL_INIT(key, (in_features, self.features), self.param_dtype)
    frozen = self._stored(merge(plain, lora_a, lora_b, -self.scale))
    return {"params": {"lora_a": lora_a, "lora_b": lora_b}, "frozen": frozen}

  def _stored(self, kernel):
    dtype = jnp.dtype(self.frozen_dtype or self.param_dtype)
    if self.kernel_tail and dtype.itemsize < kernel.dtype.itemsize:
      head, tail = split(kernel)
      return {"kernel": head, "kernel_tail": tail}
    return {"kernel": kernel.astype(dtype)}

  def _draw(self, key, number: int, std: float, shape):
    bound = 3**0.5 * std
    return jax.random.uniform(jax.random.fold_in(key, number), shape, self.param_dtype, -bound, bound)


class SwitchLoRADense(LoRADense):
  """`LoRADense` that also keeps the spare candidate vectors its LoRA vectors are switched with.

  It can be used alone, in a model of one's own. `params` is what `jax.grad` sees; `switching.switch`
  moves vectors between `params` and `candidates` and leaves the function as it was:

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

  A step of training takes gradients of `params`, switches, and lets Adam reset and freeze the switched
  vectors' counterparts by the masks that the switch returns. All three collections go on to the next step:

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

  kernel_tail: bool = True
  candidates_dtype: Any = None  # of the spares, which are rounded when they are put there; None: `param_dtype`

  def initial(self, key, in_features: int):
    """As `LoRADense.initial`, and the spares: all c candidates of a side are drawn alike, r are in the slots."""
    variables = super().initial(key, in_features)
    spares = min(in_features, self.features) - self.rank
    if spares <= 0:  # such a layer is never switched
      return variables
    std_a, std_b = adapter_std(in_features, self.features, self.rank, self.adapter_init)
    dtype = self.candidates_dtype or self.param_dtype
    return variables | {
      "candidates": {
        "spare_a": self._draw(key, 3, std_a, (spares, in_features)).astype(dtype),
        "spare_b": self._draw(key, 4, std_b, (spares, self.features)).astype(dtype),
        "timer_a": jnp.zeros(self.rank, jnp.int32),  # steps for which a vector stays frozen
        "timer_b": jnp.zeros(self.rank, jnp.int32),
        "cursor": jnp.zeros((), jnp.int32),  # vectors loaded so far, a side
      }
    }


def lora_vectors(params):
  """A tree like `params`, true for the leaves whose rows are LoRA vectors."""
  return jax.tree.map_with_path(lambda path, _: path[-1].key in ("lora_a", "lora_b"), params)
