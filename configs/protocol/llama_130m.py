"""LLaMA 130M in the protocol of GaLore, rank 256 (its Table 2: perplexity 25.36 of GaLore).

python -m experiments.pretrain --config=configs/protocol/llama_130m.py --workdir=runs/protocol_130m \
    --config.data.source=prepared --config.data.path=data/c4_256_pad
20,000 steps of 512 × 256 tokens, 2.6 billion positions in all, padding included. This repository has not run it.
"""

from configs.protocol import protocol_config


def get_config():
  """Model size, rank and steps of GaLore's Table 2; the other settings are in `configs.protocol`."""
  config = protocol_config(steps=20_000, rank=256)
  config.model.hidden_size = 768
  config.model.intermediate_size = 2048
  config.model.num_layers = 12
  config.model.num_heads = 12
  return config
