"""LLaMA 1.3B, SwitchLoRA rank 512 (paper, Table 3: perplexity 15.01 at step 38,000; rank 256: 15.89).

python -m experiments.pretrain --config=configs/llama_1b.py --workdir=runs/llama_1b \
    --config.data.source=prepared --config.data.path=data/c4_512
40,000 steps of 1,536 × 512 tokens, 31.5 billion tokens in all. This repository has not run it.
"""

from configs import base


def get_config():
  """Model and batch size of Table 1, other settings of section 4.1."""
  config = base.get_config()
  config.rank = 512
  config.batch_size = 1536
  config.seq_len = 512
  config.remat = "full"  # activations would take most of the memory
  config.accumulation = 12  # 16 sequences per micro-batch on each of 8 GPUs
  config.model.hidden_size = 2048
  config.model.intermediate_size = 5461
  config.model.num_layers = 24
  config.model.num_heads = 32
  return config
