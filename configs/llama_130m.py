"""LLaMA 130M, SwitchLoRA rank 128 (paper, Table 2: perplexity 30.26 at step 38,000).

python -m experiments.pretrain --config=configs/llama_130m.py --workdir=runs/llama_130m \
    --config.data.source=prepared --config.data.path=data/c4_256
40,000 steps of 600 × 256 tokens, 6.1 billion tokens in all. This repository has not run it.
"""

from configs import base


def get_config():
  """Model and batch size of Table 1, other settings of section 4.1."""
  config = base.get_config()
  config.rank = 128
  config.batch_size = 600
  config.seq_len = 256
  config.accumulation = 1  # 150 sequences per micro-batch on each of 4 GPUs
  config.model.hidden_size = 768
  config.model.intermediate_size = 2048
  config.model.num_layers = 12
  config.model.num_heads = 12
  return config
