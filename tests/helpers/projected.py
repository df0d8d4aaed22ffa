"""Gradients, projectors and checks that the tests of GaLore, Fira and FRUGAL share."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from small_model import host

from switchlora_jax.methods.galore import leading_directions

SIDES = {"in < out": (5, 8), "in > out": (8, 5)}


def matrices(params):
  """Projects all matrices and stacks of matrices."""
  return jax.tree.map(lambda x: x.ndim > 1, params)


def gradients(count, dtype=np.float64, **shapes):
  """A list of trees {name: standard normal array}."""
  draw = lambda t, i, shape: np.random.default_rng((t, i)).standard_normal(shape).astype(dtype)
  return [{name: draw(t, i, shape) for i, (name, shape) in enumerate(shapes.items())} for t in range(count)]


def run(tx, grads, state=None):
  """The updates for a sequence of gradients, and the state after each."""
  state, update, updates, states = jax.jit(tx.init)(grads[0]) if state is None else state, jax.jit(tx.update), [], []
  for grad in grads:
    step, state = update(grad, state, grads[0])
    updates.append(host(step))
    states.append(host(state))
  return updates, states


def equations(jaxpr):
  """Every operation of a jaxpr and of the jaxprs inside it."""
  for equation in jaxpr.eqns:
    yield equation
    for value in jax.tree.leaves(equation.params, is_leaf=lambda x: isinstance(x, (core.Jaxpr, core.ClosedJaxpr))):
      inner = value.jaxpr if isinstance(value, core.ClosedJaxpr) else value
      if isinstance(inner, core.Jaxpr):
        yield from equations(inner)


def positive_directions(grad, rank):
  """Leading left singular vectors in the dtype of the gradient, with signs by which each column has a positive sum."""
  left = jnp.linalg.svd(grad, full_matrices=False)[0][:, :rank]
  return left * jnp.sign(jnp.sum(left, 0, keepdims=True))


def projector_by_hand(grad, rank):
  """The same in NumPy, of the side of the gradient [in, out] that GaLore projects, as columns [small, rank]."""
  left, _, right = np.linalg.svd(grad, full_matrices=False)
  found = left[:, :rank] if grad.shape[0] <= grad.shape[1] else right[:rank].T
  return found * np.sign(found.sum(0))


def failing(grad, rank):
  """A decomposition that fails for gradients whose first element is 1e3."""
  return jnp.where(grad[0, 0] == 1e3, jnp.nan, leading_directions(grad, rank))


def with_failure(grads, layer):
  """The same gradients, except that `failing` fails for a layer of `up`."""
  up = grads["up"].copy()
  up[layer, 0, 0] = 1e3
  return grads | {"up": up}
