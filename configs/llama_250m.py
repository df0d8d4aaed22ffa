"""LLaMA 250M, SwitchLoRA rank 256 (paper, Table 2: perplexity 19.82 at step 38,000; rank 128: 20.97).

python -m experiments.pretrain --config=configs/llama_250m.py --workdir=runs/llama_250m \
    --config.data.source=prepared --config.data.path=data/c4_512
40,000 steps of 1,152 × 512 tokens, 23.6 billion tokens in all. This repository has not run it.
"""

from configs import base


def get_config():
  """Model and batch size of Table 1, other settings of section 4.1."""
  config = base.get_config()
  config.rank = 256
  config.batch_size = 1152
  config.seq_len = 512
  config.remat = "full"  # activations would take most of the memory
  config.accumulation = 2  # 72 sequences per micro-batch on each of 8 GPUs
  config.model.hidden_size = 768
  config.model.intermediate_size = 2560
  config.model.num_layers = 24
  config.model.num_heads = 16
  return config
