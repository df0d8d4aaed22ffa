"""Comparison of five methods at small scale, on Wikipedia text and a laptop CPU; results: docs/miniature.md.

python -m experiments.compare --config=configs/llama_mini.py --workdir=runs/mini \
    --config.data.path='wiki/train*' --config.data.eval_path='wiki/valid*'
3,000 steps of 8 × 128 tokens per run, 11 minutes on one core (measured).
"""

from configs import llama_tiny


def get_config():
  """A LLaMA of 1.3M weights, rank hidden_size / 8; a cosine to 0 for all methods."""
  config = llama_tiny.get_config()
  config.rank = 16
  config.steps = 3000
  config.min_lr_ratio = 0.0
  config.eval_every = 500
  config.eval_tokens = 65_536
  config.checkpoint_every = 1000
  config.switch.interval = 40
  config.relora.restart_every = 500
  config.relora.restart_warmup_steps = 50
  config.data.source = "text"
  return config
