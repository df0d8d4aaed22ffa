"""LLaMA with squared ReLU in place of SwiGLU (So et al. 2021, arXiv:2109.08668).

The toy model of CONTRIBUTING.md.
"""

import flax.linen as nn

from switchlora_jax.models import llama


class Block(llama.Block):
  """A LLaMA block whose MLP has two linear layers, both made by `dense`."""

  def mlp(self, x):
    """x [batch, length, hidden] to the same shape."""
    hidden = nn.relu(self._linear("up", self.architecture.intermediate_size, x)) ** 2
    return self._linear("down", x.shape[-1], hidden)


class SquaredReLU(llama.LLaMA):
  """As `LLaMA`, with these blocks."""

  block_class = Block
