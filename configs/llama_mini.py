"""A miniature of the comparison: five methods on encyclopedia text, on a laptop CPU; docs/miniature.md has results.

python -m experiments.compare --config=configs/llama_mini.py --workdir=runs/mini \
    --config.data.path='wiki/train*' --config.data.eval_path='wiki/valid*'
One run, 3,000 steps of 8 × 128 tokens, takes 11 minutes of one core (measured here).
"""

from configs import llama_tiny


def get_config():
  """LLaMA of 1.3M weights, rank h/8; every method with the same schedule, a cosine to 0."""
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
