"""The decoder, its loss, plain weights and text generation. `make_model` is the only constructor."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from switchlora_jax.models.architecture import Architecture, architecture_of
from switchlora_jax.models.llama import INIT, LLaMA

__all__ = ["Architecture", "LLaMA", "architecture_of", "attention_kernel", "make_model"]


def make_model(keys, dense=None, *, dtype=jnp.float32, param_dtype=jnp.float32, device=None, **options) -> LLaMA:
  """The decoder that keys of `config.model` describe.

  Args:
    keys: an `Architecture`, or a mapping with vocab_size, hidden_size, intermediate_size, num_layers and num_heads at
      least; see `architecture_of`.
    dense: factory of the linear layers of a block, `dense(features, name=…)`. The default is `flax.linen.Dense`
      without bias and with the initialisation of full-rank training; the `params` of the model then are the plain
      weights of `models.weights`.
    dtype: dtype of the computation.
    param_dtype: dtype of embedding, norms, head and, by default, of the linear layers.
    device: the device that runs the model; it selects the attention kernel. None: JAX's first device.
    options: `remat` and `head`, see `LLaMA`.
  """
  dense = dense or partial(nn.Dense, use_bias=False, kernel_init=INIT, dtype=dtype, param_dtype=param_dtype)
  kernel = attention_kernel(jax.devices()[0] if device is None else device)
  return LLaMA(
    architecture_of(keys), dense=dense, attention_kernel=kernel, dtype=dtype, param_dtype=param_dtype, **options
  )


def attention_kernel(device) -> str:
  """The kernel of `llama.causal_attention` for a device; cuDNN's needs compute capability 8.0 (Ampere) or later."""
  if device.platform == "cpu":
    return "loop"
  return "cudnn" if device.platform == "gpu" and float(device.compute_capability) >= 8 else "batched"
