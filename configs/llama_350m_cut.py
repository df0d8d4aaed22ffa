"""LLaMA 350M cut to two blocks and to batches of 4 rows: the shape whose steps are timed.

python -m experiments.benchmark --config=configs/llama_350m_cut.py
Not a model to train. Vocabulary 2,048, so that the head does not hide the blocks.
"""

from configs import llama_350m


def get_config():
  """The paper's widths, rank 128."""
  config = llama_350m.get_config()
  config.rank = 128
  config.batch_size = 4
  config.accumulation = 1
  config.remat = "none"
  config.model.vocab_size = 2048
  config.model.num_layers = 2
  return config
