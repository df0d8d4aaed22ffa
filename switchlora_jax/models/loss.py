"""Next-token cross-entropy from the hidden states, a chunk of tokens at a time.

The logits are the largest array of a step: at 16 × 512 tokens and a vocabulary of 32,100 they take 1 GB in
float32, and their gradient as much again. Here those of `CHUNK` tokens are alive at once, forward and backward.
"""

import jax
import jax.numpy as jnp

from switchlora_jax.parallel.sharding import gather, is_split

CHUNK = 1024  # tokens, at most: enough rows to keep a GPU's matrix units busy


def row_losses(model, params, frozen, rows):
  """Cross-entropy of each row's `length - 1` next-token targets, their mean; [batch, length] to [batch], nats.

  In float32 or wider. To be differentiated, take `mean_loss`: this would keep the logits of all chunks.
  """
  x, kernel, targets = _head_inputs(model, params, frozen, rows)
  return token_losses(x, kernel, targets).reshape(len(rows), -1).mean(-1)


def mean_loss(model, params, frozen, rows):
  """The mean of `row_losses`, []; its gradient costs no second product for the logits."""
  return mean_token_loss(*_head_inputs(model, params, frozen, rows))


def on_parts(loss, model, params, frozen):
  """One of the losses above as a device computes it inside a `shard_map`, from its parts of the arrays.

  A block's arrays are gathered a layer at a time, inside the model's loop over the layers.

  Args:
    params, frozen: PartitionSpecs as from `Placement.specs`.
  Returns:
    (params, frozen, rows) -> the loss of this device's rows.
  """
  blocks = {"params": params["blocks"], "frozen": frozen.get("blocks", {})}
  if is_split(blocks):
    model = model.clone(gather=lambda layer: gather(layer, {name: blocks[name] for name in layer}, removed_axes=1))

  def local(held, base, rows):
    whole = {name: part if name == "blocks" else gather(part, params[name]) for name, part in held.items()}
    return loss(model, whole, base, rows)

  return local


def _head_inputs(model, params, frozen, rows):
  """Hidden states [tokens, hidden] before the head, its kernel [hidden, vocab] and the targets [tokens]."""
  x = model.clone(head=False).apply({"params": params, "frozen": frozen}, rows)[:, :-1]
  return x.reshape(-1, x.shape[-1]), params["head"]["kernel"], rows[:, 1:].reshape(-1)


def token_losses(x, kernel, targets):
  """−log softmax(x · kernel)[target] of each token, [tokens] in float32 or wider.

  Shapes: x [tokens, hidden], kernel [hidden, vocab], targets [tokens] integers. The product is that of x's dtype.
  """
  weight = kernel.astype(x.dtype)

  def one(_, chunk):
    return None, _softmax(*chunk, weight)[0]

  _, losses = jax.lax.scan(one, None, _chunks(x, targets))
  return losses.reshape(-1)[: len(targets)]


@jax.custom_vjp
def mean_token_loss(x, kernel, targets):
  """The mean of `token_losses`, [].

  Differentiated, the forward pass has the gradients as well: each chunk's logits are at hand only then. They are
  those of a cotangent of 1, by whose true value the backward pass multiplies them; hence a scalar loss. The
  kernel's is summed in float32 or wider, whatever the dtype of the products.
  """
  return token_losses(x, kernel, targets).mean()


def _forward(x, kernel, targets):
  weight, tokens = kernel.astype(x.dtype), len(targets)
  wide = jnp.promote_types(x.dtype, jnp.float32)

  def one(d_kernel, chunk):
    x, targets = chunk
    losses, probabilities = _softmax(x, targets, weight)
    is_target = jnp.arange(weight.shape[-1])[None] == targets[:, None]
    d_logits = (probabilities - is_target).astype(x.dtype)  # of the sum over tokens; the mean's may underflow
    dx = jnp.matmul(d_logits, weight.T, preferred_element_type=wide) / tokens
    return d_kernel + jnp.matmul(x.T, d_logits, preferred_element_type=wide), (losses, dx.astype(x.dtype))

  d_kernel, (losses, dx) = jax.lax.scan(one, zeros_accumulator(kernel.astype(wide)), _chunks(x, targets))
  dx = dx.reshape(-1, x.shape[-1])[:tokens]
  return losses.reshape(-1)[:tokens].mean(), (dx, (d_kernel / tokens).astype(kernel.dtype))


def _backward(gradients, cotangent):
  dx, d_kernel = ((cotangent * gradient).astype(gradient.dtype) for gradient in gradients)
  return dx, d_kernel, None


mean_token_loss.defvjp(_forward, _backward)


def zeros_accumulator(x):
  """Zeros like x, for a loop to add gradients to.

  Not constant: the optimizer has zeros of this shape too, and XLA would make one array of both and keep it, beside
  the sum, for the whole step.
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
  """x [chunks, size, hidden] and targets [chunks, size], filled up with zeros that nothing is counted of.

  The chunks are as few as they can be and as equal; their size is a multiple of 8, which matrix units like.
  """
  tokens = len(targets)
  chunks = -(-tokens // CHUNK)
  size = -(-tokens // (8 * chunks)) * 8
  padding = (0, chunks * size - tokens)
  x, targets = jnp.pad(x, (padding, (0, 0))), jnp.pad(targets, padding)
  return x.reshape(chunks, size, -1), targets.reshape(chunks, size)
