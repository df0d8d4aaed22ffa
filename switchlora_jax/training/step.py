"""One training step as one jitted function: loss, accumulated gradients, clipping, the method's hooks, update."""

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import path_aware_map
from jax.sharding import PartitionSpec

from switchlora_jax.lowrank.optimizer import clip_by_global_norm
from switchlora_jax.methods.base import TrainState
from switchlora_jax.models.loss import mean_loss, on_parts, padded_loss, target_count, zeros_accumulator
from switchlora_jax.models.weights import is_linear, is_vector
from switchlora_jax.parallel.sharding import BOTH, Placement, by_rows, psum, reduce, replicated
from switchlora_jax.training import anomalies


def accumulated_gradients(model, placement: Placement, state, accumulation: int, padded: bool = False):
  """(params, frozen, rows [batch, length]) -> mean loss and gradients over the batch of all devices.

  If sequences are `padded`, the mean is over the targets that are not padding. Their number in the whole batch divides
  the sum of each micro-batch: a mean of means would weight the tokens of short documents more.

  Each device sums the gradients of its `accumulation` micro-batches locally. One reduction over the devices follows,
  regardless of the number of micro-batches. Only parameters that are sharded (`sharding.trained`) are all-gathered,
  and their gradients reduce-scattered, in every micro-batch.
  """
  param_specs, frozen_specs = placement.specs(state.params, "trained"), placement.specs(state.frozen, "frozen")
  grad_specs = placement.specs(state.params, "gradient")
  loss_of = on_parts(padded_loss if padded else mean_loss, model, param_specs, frozen_specs)

  def local(params, frozen, rows):
    count = (psum(target_count(rows), BOTH),) if padded else ()
    value_and_grad = jax.value_and_grad(lambda p, tokens: loss_of(p, frozen, tokens, *count))
    loss, grads = _summed(value_and_grad, params, rows.reshape(accumulation, -1, rows.shape[-1]))
    if not padded:
      loss, grads = jax.tree.map(lambda x: x / (accumulation * placement.mesh.size), (loss, grads))
    return psum(loss, BOTH), reduce(grads, param_specs, grad_specs)

  in_specs, out_specs = (param_specs, frozen_specs, PartitionSpec(BOTH)), (PartitionSpec(), grad_specs)
  return jax.shard_map(local, mesh=placement.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _summed(value_and_grad, params, micro_batches):
  """The sum of value_and_grad(params, tokens) over micro_batches [accumulation, rows, length]."""
  if len(micro_batches) == 1:  # skip the scan and its extra gradient buffer
    return value_and_grad(params, micro_batches[0])

  def add(total, tokens):
    return jax.tree.map(jnp.add, total, value_and_grad(params, tokens)), None

  loss, _ = jax.eval_shape(value_and_grad, params, micro_batches[0])
  start = (jnp.zeros((), loss.dtype), jax.tree.map(zeros_accumulator, params))
  return jax.lax.scan(add, start, micro_batches)[0]


def apply_optimizer(
  method, state: TrainState, grads, masks, skip, rest_ratio: float = 1.0, weight_decay: float = 0.0
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Update params and opt_state by any Optax transformation; if `skip` [] bool is true, both stay bitwise the same.

  The gradients of a skipped step may not be finite. The optimizer gets zeros instead, and its result is discarded.

  Args:
    rest_ratio: learning rate of the parameters outside the linear layers of the blocks / learning rate of these.
    weight_decay: before its update, each parameter is scaled by 1 - rate·weight_decay, as in PyTorch's AdamW and the
      authors' code. Norms and the vectors marked by the mask `freeze` are not.
  Returns:
    The state, and the learning rates, each [].
  """
  grads = jax.tree.map(lambda g: jnp.where(skip, 0, g), grads)
  directions, opt_state = method.optimizer.update(grads, state.opt_state, state.params, **masks)
  rate = jnp.asarray(method.schedule(state.step))
  rest_rate = rate if rest_ratio == 1.0 else rate * rest_ratio

  params = state.params
  rates = path_aware_map(lambda path, _: rate if is_linear(path) else rest_rate, params)

  def decayed(param, rate, norm, frozen):
    return param if norm else param * jnp.where(frozen, 1, 1 - rate * weight_decay).astype(param.dtype)

  if weight_decay:
    norms = path_aware_map(lambda path, _: is_vector(path), params)
    freeze = masks.get("freeze", jax.tree.map(lambda _: False, params))
    params = jax.tree.map(decayed, params, rates, norms, freeze)
  updates = jax.tree.map(lambda rate, direction: -rate.astype(direction.dtype) * direction, rates, directions)
  new = (optax.apply_updates(params, updates), opt_state)
  params, opt_state = jax.tree.map(lambda new, old: jnp.where(skip, old, new), new, (state.params, state.opt_state))
  return state._replace(params=params, opt_state=opt_state), {"learning_rate": rate, "rest_learning_rate": rest_rate}


def is_broken(loss, norm, clip_norm: float) -> jax.Array:
  """Whether a step must be skipped: the loss, the gradient norm or the square of the clipped norm is not finite.

  Adam squares the clipped gradients. An element whose second moment is inf would never be updated again.
  """
  clipped = jnp.minimum(norm, clip_norm)
  return ~(jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(clipped**2))


def make_train_step(
  model,
  method,
  placement: Placement,
  state,
  *,
  accumulation: int,
  clip_norm: float,
  spike,
  rest_ratio: float = 1.0,
  weight_decay: float = 0.0,
  padded: bool = False,
):
  """The compiled step: (state, rows [batch, length] int32) -> (next state, metrics); the state is donated.

  A step is skipped if a number is not finite (see `is_broken`), or if the loss is a spike and `spike.action` is "skip".
  A skipped step changes nothing but `step`, the counters of skipped steps and the spike detector. A skipped spike is
  not counted in `skipped`.

  Args:
    method: a `methods.base.Method`; its docstring lists the parts of a step in order.
    placement: the shardings of the state.
    state: the train state or its ShapeDtypeStructs, for the shapes.
    accumulation: number of micro-batches per device.
    clip_norm: largest global norm of the gradients.
    spike: `config.spike`.
    rest_ratio, weight_decay: see `apply_optimizer`.
    padded: whether negative ids in `rows` are padding; see `accumulated_gradients`.
  Returns:
    The jitted step. Its metrics are [] arrays: loss, grad_norm (before clipping), learning_rate, rest_learning_rate,
    skipped, skipped_in_a_row, those of `anomalies.detect_spike`, and those of the method. If `padded`, also tokens, the
    number of ids of the batch that are not padding, and padding_share, the share of the others.
  """
  gradients = accumulated_gradients(model, placement, state, accumulation, padded)

  def train_step(state: TrainState, rows):
    state = method.before_gradients(state)
    loss, grads = gradients(state.params, state.frozen, rows)
    grads, norm = clip_by_global_norm(grads, clip_norm)
    broken = is_broken(loss, norm, clip_norm)
    spiked, spikes, spike_metrics = anomalies.detect_spike(state.spikes, loss, spike)
    skip = broken | spiked if spike.action == "skip" else broken
    state, masks, metrics = method.before_update(state, skip)
    state, rates = apply_optimizer(method, state, grads, masks, skip, rest_ratio, weight_decay)
    metrics |= method.optimizer_metrics(state.opt_state) | spike_metrics
    state = state._replace(
      step=state.step + 1,
      skipped=state.skipped + broken,
      skipped_in_a_row=jnp.where(broken, state.skipped_in_a_row + 1, 0),
      spikes=spikes,
    )
    metrics |= {"loss": loss, "grad_norm": norm} | rates
    if padded:
      tokens = jnp.sum(rows >= 0, dtype=jnp.int32)
      metrics |= {"tokens": tokens, "padding_share": 1 - tokens / rows.size}
    return state, metrics | {"skipped": state.skipped, "skipped_in_a_row": state.skipped_in_a_row}

  shardings, mesh = placement.shardings(state), placement.mesh
  in_shardings, out_shardings = (shardings, by_rows(mesh)), (shardings, replicated(mesh))
  return jax.jit(train_step, donate_argnums=0, in_shardings=in_shardings, out_shardings=out_shardings)
