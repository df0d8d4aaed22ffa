"""LLaMA 60M in the protocol of GaLore, rank 128 (its Table 2: perplexity 34.88 of GaLore).

python -m experiments.pretrain --config=configs/protocol/llama_60m.py --workdir=runs/protocol_60m \
    --config.data.source=prepared --config.data.path=data/c4_256_pad
10,000 steps of 512 × 256 tokens, 1.3 billion positions in all, padding included. This repository has not run it.
"""

from configs.protocol import protocol_config


def get_config():
  """Model size, rank and steps of GaLore's Table 2; the other settings are in `configs.protocol`."""
  config = protocol_config(steps=10_000, rank=128)
  config.model.hidden_size = 512
  config.model.intermediate_size = 1376
  config.model.num_layers = 8
  config.model.num_heads = 8
  return config
