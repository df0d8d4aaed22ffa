"""The default config: a LLaMA of 1.3M weights, SwitchLoRA rank 32, on the documentation of installed packages.

python -m experiments.pretrain --config=configs/llama_tiny.py --workdir=runs/tiny
1,000 steps of 8 × 128 tokens, 2 minutes on a CPU with 2 cores; validation perplexity 39.84 (measured).
"""

from configs import base

# Validation perplexity and bits per byte at the budget of this config, means of three seeds with both learning rates
# swept, printed after a run of the unchanged config. docs/results/index.md has the command.
REFERENCE = {
  "full rank": (38.15, 1.680),
  "full rank with Muon": (36.60, 1.660),
  "LoRA": (38.46, 1.683),
  "SwitchLoRA": (38.62, 1.685),
}


def get_config():
  """A small model and a run of minutes; all settings of the method are those of `base`, except the rank."""
  config = base.get_config()
  config.rank = 32
  config.steps = 1000
  config.batch_size = 8
  config.seq_len = 128
  config.eval_every = 250
  config.eval_tokens = 200_000
  config.checkpoint_every = 250
  config.model.vocab_size = 2048
  config.model.hidden_size = 128
  config.model.intermediate_size = 344
  config.model.num_layers = 4
  config.model.num_heads = 4
  config.relora.restart_every = 250
  config.relora.restart_warmup_steps = 25
  config.data.source = "docs"
  return config
