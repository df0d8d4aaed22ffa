"""LLaMA 1B in the protocol of GaLore, rank 512 (its Table 2: perplexity 15.64 of GaLore).

python -m experiments.pretrain --config=configs/protocol/llama_1b.py --workdir=runs/protocol_1b \
    --config.data.source=prepared --config.data.path=data/c4_256_pad
100,000 steps of 512 × 256 tokens, 13.1 billion positions in all, padding included. This repository has not run it.
"""

from configs.protocol import protocol_config


def get_config():
  """Model size, rank and steps of GaLore's Table 2; the other settings are in `configs.protocol`."""
  config = protocol_config(steps=100_000, rank=512)
  config.remat = "full"  # activations would take most of the memory
  config.model.hidden_size = 2048
  config.model.intermediate_size = 5461
  config.model.num_layers = 24
  config.model.num_heads = 32
  return config
