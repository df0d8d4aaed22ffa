"""Every key there is, with its default: the paper's setting where the paper has one (section 4.1)."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
  """The config that the files beside this one start from."""
  config = ConfigDict()
  config.method = "switchlora"  # full | lora | switchlora | relora | galore
  config.rank = 128  # LoRA vectors a side, or directions of a projected gradient (galore); not used by full
  config.steps = 40_000  # updates; the horizon of learning-rate and switch schedules
  config.batch_size = 1152  # rows a step, over all devices and micro-batches
  config.seq_len = 512  # tokens a row
  config.learning_rate = placeholder(float)  # peak; None: the method's own
  config.warmup_steps = 100  # linear warm-up; then a cosine to 0 at `steps`
  config.min_lr_ratio = placeholder(float)  # of the peak, a floor; relora and galore end there; none in a warm start
  config.warm_start_steps = 0  # full-rank steps before the low-rank method takes over, part of `steps`
  config.warm_start_learning_rate = placeholder(float)  # peak of those steps; None: the full method's own
  config.warm_start_warmup_steps = placeholder(int)  # warm-up of those steps; None: warmup_steps
  config.warm_start_from = ""  # a run directory, or a Hugging Face LLaMA folder, whose weights the run starts from
  config.clip_norm = 1.0  # largest global norm of the gradients
  config.accumulation = 1  # micro-batches a step on each device
  config.seed = 0  # of initialisation, data order and switching

  config.dtype = placeholder(str)  # of the computation: float32 | bfloat16 | float64; None: bfloat16 on GPUs
  config.param_dtype = "float32"  # of all that is stored; bfloat16 is what the authors train in
  config.frozen_dtype = placeholder(str)  # of the kernels below adapters: float32 | bfloat16; None: param_dtype
  config.candidates_dtype = placeholder(str)  # of the spare vectors: float32 | bfloat16; None: param_dtype
  config.remat = "none"  # recomputed in the backward pass: none | linear (all but linear layers) | full (each block)
  config.count_per_element = False  # Adam's step count as large as the parameters (App. D); lora and switchlora

  config.eval_every = 1000  # steps between evaluations; one more at the end
  config.eval_tokens = 10_000_000  # validation tokens, at most
  config.checkpoint_every = 1000  # steps between checkpoints; one more at the end
  config.keep_checkpoints = 3  # the newest that are kept
  config.log_every = 10  # steps between writes of metrics.jsonl, which has a line for each step
  config.max_skipped = 20  # updates skipped in a row (loss or gradient not finite) before the run stops
  config.hang_seconds = 1800.0  # for which one restore, step, evaluation or save may take; 0: for ever

  config.spike = ConfigDict()  # a loss above mean + threshold · standard deviation of those before it
  config.spike.window = 128  # losses that mean and deviation are taken of; before there are as many, nothing is a spike
  config.spike.threshold = 6.0  # of losses that stay high the first window / (1 + threshold²) are spikes
  config.spike.action = "report"  # report | skip (the update) | rollback (to the last checkpoint, the data go on)
  config.spike.max_rollbacks = 10  # in a run, before it stops

  config.model = ConfigDict()
  config.model.vocab_size = 32_100  # T5's
  config.model.hidden_size = 1024  # width of the residual stream
  config.model.intermediate_size = 2736  # width inside the MLP
  config.model.num_layers = 24  # blocks
  config.model.num_heads = 16  # attention heads; must divide hidden_size into even parts

  config.sharding = ConfigDict()  # where arrays live; a run may continue under any, but for the order of sums the same
  config.sharding.fsdp = 1  # devices in the second axis of the mesh, over which `sharded` splits; the first: the rest
  config.sharding.trained = "sharded"  # what is trained: sharded | replicated
  config.sharding.optimizer = "sharded"  # the optimizer's state: sharded | replicated
  config.sharding.frozen = "replicated"  # base kernels: replicated | sharded
  config.sharding.candidates = "sharded"  # over all devices, by rows; replicated | host (pinned memory) as well

  config.switch = ConfigDict()  # used by switchlora; init by lora too
  config.switch.interval = 40  # steps between two switches of one vector at the start; 0: never
  config.switch.freeze_steps = 5  # steps for which a switched vector's counterpart is frozen
  config.switch.decay_point = 0.1  # by this fraction of `steps` the switching rate has fallen …
  config.switch.decay_to = 1 / 3  # … to this fraction of its start (the authors' code has 0.3)
  config.switch.init = "switchlora"  # switchlora (eq. 3) | lora (A uniform in ±1/√in, B zero)
  config.switch.order = "sequential"  # of the candidates: sequential | random (section 2.2)
  config.switch.reset = True  # reset the optimizer state of a switched vector's counterpart

  config.relora = ConfigDict()  # used by relora
  config.relora.restart_every = 5000  # steps between two merges of the adapters into the base weights
  config.relora.restart_warmup_steps = 100  # linear warm-up after each of them
  config.relora.prune = "random"  # which moments are zeroed at a merge: random | magnitude (the smallest)
  config.relora.prune_ratio = 0.999  # share of the moments that are zeroed
  config.relora.alpha = 32.0  # the adapter is scaled by alpha / rank

  config.galore = ConfigDict()  # used by galore
  config.galore.refresh_every = 200  # steps between two singular value decompositions of the gradients
  config.galore.scale = 0.25  # of the update that is projected back

  config.data = ConfigDict()
  config.data.source = "text"  # docs (documentation of the packages) | text (your files) | prepared | stream
  config.data.path = ""  # text, stream: a glob of plain text, JSON lines or Parquet, or hub:NAME; prepared: a folder
  config.data.eval_path = ""  # text, stream: a glob of validation files; empty: text holds out the last 1% of the rows
  config.data.tokenizer = ""  # a SentencePiece model; empty: one is trained on the text
  config.data.epochs = 1  # times that the rows may be used; a run that wants more of them does not start
  config.data.cache_dir = "cache"  # where tokenizers and packed rows are kept between runs
  return config.lock()
