"""The protocol of GaLore's pre-training experiments (arXiv 2403.03507, section 5.1 and its appendix), by model size.

Later papers compare with GaLore's Table 2 in this protocol: documents of C4, cut or padded to 256 tokens of T5's
vocabulary, in batches of 512; a warm-up in the first 10% of the steps, then a cosine to 10% of the peak.

The method is GaLore with its authors' settings; `--config.method` selects another one, with its own default learning
rate. The authors tuned the learning rates of the other methods per size and did not publish them.

Known differences from the authors' runs:
  - Their vocabulary has 32,000 ids. Here it has the 32,100 of T5's tokenizer, whose last 100 do not occur in text.
  - They train in pure bfloat16. Here parameters and optimizer state are float32 unless `param_dtype` is set.
  - Their loss is a mean of the means of micro-batches. Here it is the mean over all tokens of a batch.
  - Their validation loss is a mean of the means of batches. Here it is the mean over all tokens.
  - Gradients are clipped to a norm of 1 here; `--config.clip_norm=inf` disables it.
"""

from ml_collections import ConfigDict

from configs import base


def protocol_config(*, steps: int, rank: int) -> ConfigDict:
  """The keys that all model sizes share.

  Args:
    steps: number of updates; the first tenth of them warms up.
    rank: that of Table 2 for the size, for all methods that have one.
  """
  config = base.get_config()
  config.method = "galore"  # learning rate 1e-2, scale 0.25, a new subspace every 200 steps: defaults of the method
  config.rank = rank
  config.steps = steps
  config.warmup_steps = steps // 10
  config.min_lr_ratio = 0.1
  config.batch_size = 512
  config.seq_len = 256
  config.data.packing = "pad"
  return config
