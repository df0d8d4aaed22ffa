"""Next-token cross-entropy from the hidden states, one chunk of tokens at a time.

The logits are the largest array of a step: for 16 × 512 tokens and a vocabulary of 32,100, they take 1 GB in float32,
and their gradient takes another 1 GB. The functions here only store the logits of `CHUNK` tokens at a time, in the
forward and in the backward pass.

Negative token ids are padding, which only the functions named `padded` accept. Padding at the end of a sequence needs
no attention mask: no earlier position attends to it.
"""

import jax
import jax.numpy as jnp

from switchlora_jax.models.llama import head_kernel
from switchlora_jax.parallel.sharding import gather, is_split

CHUNK = 1024  # largest number of tokens per chunk; large enough to use the tensor cores of a GPU


def row_losses(model, params, frozen, rows):
  """Mean cross-entropy of the `length - 1` next-token targets of each sequence, [batch] in nats, float32 or wider.

  Not for differentiation, which would store the logits of all chunks; use `mean_loss`.

  Args:
    rows: token ids [batch, length].
  """
  x, kernel, targets = _head_inputs(model, params, frozen, rows)
  return token_losses(x, kernel, targets).reshape(len(rows), -1).mean(-1)


def mean_loss(model, params, frozen, rows):
  """The mean of `row_losses`, []; differentiating it does not compute the logits a second time."""
  return mean_token_loss(*_head_inputs(model, params, frozen, rows))


def padded_row_losses(model, params, frozen, rows):
  """The sum of the cross-entropy of the real next-token targets of each sequence, and their number: [batch, 2].

  As `row_losses`, but targets that are padding are left out.
  """
  x, kernel, targets = _head_inputs(model, params, frozen, rows, padded=True)
  losses, real = token_losses(x, kernel, targets), targets >= 0
  sums_and_counts = jnp.stack([jnp.where(real, losses, 0), real.astype(losses.dtype)], -1)
  return sums_and_counts.reshape(len(rows), -1, 2).sum(1)


def target_count(rows):
  """Number of next-token targets in sequences [batch, length] that are not padding, [] int32."""
  return jnp.sum(rows[:, 1:] >= 0, dtype=jnp.int32)


def padded_loss(model, params, frozen, rows, count):
  """The sum of the cross-entropy of the real targets of sequences [batch, length], divided by `count`, [].

  With the `target_count` of a batch as `count`, these add up to the mean over its real targets, however its sequences
  are distributed over calls.
  """
  return padded_token_loss(*_head_inputs(model, params, frozen, rows, padded=True), count)


def on_parts(loss, model, params, frozen):
  """A loss for use inside a `shard_map`, computed from this device's shards of params and frozen kernels.

  The arrays of a block are all-gathered one layer at a time, inside the model's loop over the layers.

  Args:
    loss: `mean_loss`, `row_losses`, `padded_loss` or `padded_row_losses`.
    params, frozen: PartitionSpecs from `Placement.specs`.
  Returns:
    (params, frozen, rows, further arguments of `loss`) -> the loss of this device's sequences.
  """
  blocks = {"params": params["blocks"], "frozen": frozen.get("blocks", {})}
  if is_split(blocks):
    model = model.clone(gather=lambda layer: gather(layer, {name: blocks[name] for name in layer}, removed_axes=1))

  def local(param_shards, frozen_shards, rows, *arguments):
    whole = {name: part if name == "blocks" else gather(part, params[name]) for name, part in param_shards.items()}
    return loss(model, whole, frozen_shards, rows, *arguments)

  return local


def _head_inputs(model, params, frozen, rows, padded: bool = False):
  """Hidden states [tokens, hidden] before the head, the head's kernel [hidden, vocab] and the targets [tokens]."""
  ids = jnp.maximum(rows, 0) if padded else rows
  x = model.clone(head=False).apply({"params": params, "frozen": frozen}, ids)[:, :-1]
  return x.reshape(-1, x.shape[-1]), head_kernel(params), rows[:, 1:].reshape(-1)


def token_losses(x, kernel, targets):
  """−log softmax(x · kernel)[target] of each token, [tokens] in float32 or wider.

  The kernel is cast to the dtype of x before the product.

  Shapes: x [tokens, hidden], kernel [hidden, vocab], targets [tokens] integers.
  """
  weight = kernel.astype(x.dtype)

  def chunk_losses(_, chunk):
    return None, _softmax(*chunk, weight)[0]

  _, losses = jax.lax.scan(chunk_losses, None, _chunks(x, targets))
  return losses.reshape(-1)[: len(targets)]


@jax.custom_vjp
def mean_token_loss(x, kernel, targets):
  """The mean of `token_losses`, [].

  When differentiated, the forward pass also computes the gradients, because each chunk's logits exist only then. It
  assumes a cotangent of 1; the backward pass multiplies by the actual cotangent, which works because the loss is a
  scalar. The gradient of the kernel is summed in float32 or wider.
  """
  return token_losses(x, kernel, targets).mean()


def _forward(x, kernel, targets, count=None):
  """The loss and its gradients: the mean over all targets, or the sum over those that are not padding over `count`."""
  weight, tokens = kernel.astype(x.dtype), len(targets)
  wide = jnp.promote_types(x.dtype, jnp.float32)
  divisor = tokens if count is None else jnp.maximum(count, 1).astype(wide)

  def chunk_gradients(d_kernel, chunk):
    x, targets = chunk
    losses, probabilities = _softmax(x, targets, weight)
    is_target = jnp.arange(weight.shape[-1])[None] == targets[:, None]
    d_logits = (probabilities - is_target).astype(x.dtype)  # for the sum over tokens; those of the mean may underflow
    if count is not None:
      d_logits = jnp.where(targets[:, None] >= 0, d_logits, 0)
    dx = jnp.matmul(d_logits, weight.T, preferred_element_type=wide) / divisor
    return d_kernel + jnp.matmul(x.T, d_logits, preferred_element_type=wide), (losses, dx.astype(x.dtype))

  d_kernel, (losses, dx) = jax.lax.scan(chunk_gradients, zeros_accumulator(kernel.astype(wide)), _chunks(x, targets))
  dx = dx.reshape(-1, x.shape[-1])[:tokens]
  losses = losses.reshape(-1)[:tokens]
  loss = losses.mean() if count is None else jnp.where(targets >= 0, losses, 0).sum() / divisor
  return loss, (dx, (d_kernel / divisor).astype(kernel.dtype))


def _backward(gradients, cotangent):
  dx, d_kernel = ((cotangent * gradient).astype(gradient.dtype) for gradient in gradients)
  return dx, d_kernel, None


mean_token_loss.defvjp(_forward, _backward)


@jax.custom_vjp
def padded_token_loss(x, kernel, targets, count):
  """The sum of the `token_losses` of targets that are not padding (negative), divided by `count` [] int32, [].

  When differentiated, it does what `mean_token_loss` does. If all targets are padding, the loss and its gradients are
  0, also for a `count` of 0.
  """
  losses = jnp.where(targets >= 0, token_losses(x, kernel, targets), 0)
  return losses.sum() / jnp.maximum(count, 1).astype(losses.dtype)


padded_token_loss.defvjp(_forward, lambda gradients, cotangent: (*_backward(gradients, cotangent), None))


def zeros_accumulator(x):
  """Gradient accumulator; `0 * x` stops XLA sharing it with the optimizer's zeros.

  XLA would otherwise merge both constants into one array and keep it, besides the sum, for the whole step.
  """
  return 0 * x


def _softmax(x, targets, weight):
  """Losses [chunk] and probabilities [chunk, vocab] of a chunk of tokens, in float32 or wider."""
  wide = jnp.promote_types(x.dtype, jnp.float32)
  logits = jnp.matmul(x, weight, preferred_element_type=wide)
  log_total = jax.nn.logsumexp(logits, -1, keepdims=True)
  chosen = jnp.take_along_axis(logits, targets[:, None], -1)
  return (log_total - chosen)[:, 0], jnp.exp(logits - log_total)


def _chunks(x, targets):
  """Split x into [chunks, size, hidden] and targets into [chunks, size], padded with zeros whose losses are dropped.

  The number of chunks is the smallest possible. Their size is a multiple of 8, for tensor cores.
  """
  tokens = len(targets)
  chunks = -(-tokens // CHUNK)
  size = -(-tokens // (8 * chunks)) * 8
  padding = (0, chunks * size - tokens)
  x, targets = jnp.pad(x, (padding, (0, 0))), jnp.pad(targets, padding)
  return x.reshape(chunks, size, -1), targets.reshape(chunks, size)
