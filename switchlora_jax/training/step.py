"""One training step as one dispatch: loss → accumulated gradients → clip → the method → update."""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from switchlora_jax.lowrank.optimizer import clip_by_global_norm
from switchlora_jax.methods.base import TrainState
from switchlora_jax.models.loss import mean_loss, on_parts, zeros_accumulator
from switchlora_jax.parallel.sharding import BOTH, Placement, by_rows, reduce, replicated
from switchlora_jax.training import anomalies


def accumulated_gradients(model, placement: Placement, state, accumulation: int):
  """(params, frozen, rows [batch, length]) -> mean loss and gradients over the batch of all devices.

  Each device sums its `accumulation` micro-batches by itself; the sums meet in one reduction at the
  end, however many micro-batches there are. Only what is trained in parts (`sharding.trained`) is
  gathered, and its gradient scattered, in every micro-batch.
  """
  held, base = placement.specs(state.params, "trained"), placement.specs(state.frozen, "frozen")
  wanted = placement.specs(state.params, "gradient")
  loss_of = on_parts(mean_loss, model, held, base)

  def local(params, frozen, rows):
    value_and_grad = jax.value_and_grad(lambda p, tokens: loss_of(p, frozen, tokens))
    total = _summed(value_and_grad, params, rows.reshape(accumulation, -1, rows.shape[-1]))
    loss, grads = jax.tree.map(lambda x: x / (accumulation * placement.mesh.size), total)
    return jax.lax.psum(loss, BOTH), reduce(grads, held, wanted)

  rows, everywhere = PartitionSpec(BOTH), PartitionSpec()
  specs = dict(in_specs=(held, base, rows), out_specs=(everywhere, wanted))
  return jax.shard_map(local, mesh=placement.mesh, **specs, check_vma=False)


def _summed(value_and_grad, params, micro_batches):
  """The sum of value_and_grad(params, tokens) over micro_batches [accumulation, rows, length]."""
  if len(micro_batches) == 1:  # a sum of one would keep an array beside it
    return value_and_grad(params, micro_batches[0])

  def add(total, tokens):
    return jax.tree.map(jnp.add, total, value_and_grad(params, tokens)), None

  loss, _ = jax.eval_shape(value_and_grad, params, micro_batches[0])
  start = (jnp.zeros((), loss.dtype), jax.tree.map(zeros_accumulator, params))
  return jax.lax.scan(add, start, micro_batches)[0]


def make_train_step(model, method, placement: Placement, state, *, accumulation: int, clip_norm: float, spike):
  """The jitted step: (state, rows [batch, length] int32) -> (next state, metrics); the state is donated.

  Made for states like `state`, abstract or not, which lie where `placement` has them.

  A loss or gradient that is not finite skips the whole update, switch included: only `step` and the
  counters of skipped steps move. So does a loss spike where `spike` (`config.spike`) says skip; it is not counted as
  skipped. Metrics are [] arrays: loss, grad_norm (before clipping), learning_rate, skipped, skipped_in_a_row, those of
  `spikes.watch`, and the method's own.
  """
  gradients = accumulated_gradients(model, placement, state, accumulation)

  def train_step(state: TrainState, rows):
    state = method.before_gradients(state)
    loss, grads = gradients(state.params, state.frozen, rows)
    grads, norm = clip_by_global_norm(grads, clip_norm)
    broken = ~(jnp.isfinite(loss) & jnp.isfinite(norm))
    spiked, known, watched = anomalies.detect_spike(state.spikes, loss, spike)
    skip = broken | spiked if spike.action == "skip" else broken
    state, masks, metrics = method.before_update(state, skip)
    directions, opt_state = method.optimizer.update(grads, state.opt_state, state.params, skip=skip, **masks)
    rate = jnp.asarray(method.schedule(state.step))
    updates = jax.tree.map(lambda direction: -rate.astype(direction.dtype) * direction, directions)
    state = state._replace(
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      opt_state=opt_state,
      skipped=state.skipped + broken,
      skipped_in_a_row=jnp.where(broken, state.skipped_in_a_row + 1, 0),
      spikes=known,
    )
    metrics |= {"loss": loss, "grad_norm": norm, "learning_rate": rate} | watched | method.optimizer_metrics(opt_state)
    return state, metrics | {"skipped": state.skipped, "skipped_in_a_row": state.skipped_in_a_row}

  lies, everywhere = placement.shardings(state), replicated(placement.mesh)
  shardings = dict(in_shardings=(lies, by_rows(placement.mesh)), out_shardings=(lies, everywhere))
  return jax.jit(train_step, donate_argnums=0, **shardings)
