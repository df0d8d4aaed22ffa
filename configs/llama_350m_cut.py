"""The first two blocks of LLaMA 350M with batches of 4 sequences, for timing steps.

python -m experiments.benchmark --config=configs/llama_350m_cut.py
Not for training. The vocabulary is 2,048, so that the head takes little of the time of a step.
"""

from configs import llama_350m


def get_config():
  """The widths of the paper, rank 128."""
  config = llama_350m.get_config()
  config.rank = 128
  config.batch_size = 4
  config.accumulation = 1
  config.remat = "none"
  config.model.vocab_size = 2048
  config.model.num_layers = 2
  return config
