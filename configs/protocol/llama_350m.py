"""LLaMA 350M in the protocol of GaLore, rank 256 (its Table 2: perplexity 18.95 of GaLore).

python -m experiments.pretrain --config=configs/protocol/llama_350m.py --workdir=runs/protocol_350m \
    --config.data.source=prepared --config.data.path=data/c4_256_pad
60,000 steps of 512 × 256 tokens, 7.9 billion positions in all, padding included. This repository has not run it.
"""

from configs.protocol import protocol_config


def get_config():
  """Model size, rank and steps of GaLore's Table 2; the other settings are in `configs.protocol`."""
  config = protocol_config(steps=60_000, rank=256)
  config.remat = "full"  # activations would take most of the memory
  config.model.hidden_size = 1024
  config.model.intermediate_size = 2736
  config.model.num_layers = 24
  config.model.num_heads = 16
  return config
