"""Continue pre-training a model that exists: a run, a Hugging Face folder, or hub:NAME[@REVISION].

python -m experiments.pretrain --config=configs/continue.py --workdir=runs/continued \
    --config.warm_start_from=runs/tiny --config.data.path='books/*.jsonl' --config.seq_len=128
docs/continue.md explains the settings.
"""

from configs import base


def get_config():
  """SwitchLoRA of rank 64, 2,000 steps of 64 × 512 tokens with a new warm-up; the model's keys come from the source."""
  config = base.get_config()
  config.rank = 64
  config.steps = 2000
  config.batch_size = 64
  config.eval_every = 200
  config.eval_tokens = 1_000_000
  config.checkpoint_every = 200
  config.switch.interval = 10
  return config
