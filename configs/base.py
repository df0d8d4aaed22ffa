"""Every config key with its default: the paper's setting where the paper gives one (section 4.1).

The other files of this folder start from this config. Set a key on the command line with `--config.KEY=VALUE`, for
example `--config.rank=64` or `--config.switch.interval=20`. "None" marks a key whose default depends on other keys;
`switchlora_jax.config.resolve` fills it in.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
  """All keys with their defaults; keys cannot be added to it."""
  config = ConfigDict()
  config.method = "switchlora"  # full | lora | switchlora | relora | galore | fira | apollo | apollo_mini | frugal |
  # ldadam | sltrain | factored
  config.rank = 128  # rows per factor (LoRA vectors), or directions per projected gradient; full, apollo_mini ignore it
  config.steps = 40_000  # number of updates; the schedules of learning rate and switching span them
  config.batch_size = 1152  # sequences per step, over all devices and micro-batches
  config.seq_len = 512  # tokens per sequence
  config.learning_rate = placeholder(float)  # peak, of the blocks' linear layers; None: the default of the method
  config.rest_learning_rate = placeholder(float)  # peak, of embedding, norms and head; None: learning_rate
  config.warmup_steps = 100  # steps of linear warm-up; schedule.name follows until `steps`
  config.min_lr_ratio = placeholder(float)  # final learning rate / peak; None: of the method, or of the schedule
  config.warm_start_steps = 0  # full-rank steps at the start of the run, included in `steps`; 0: none
  config.warm_start_learning_rate = placeholder(float)  # peak in the warm start; None: the default of method full
  config.warm_start_rest_learning_rate = placeholder(float)  # None: warm_start_learning_rate
  config.warm_start_warmup_steps = placeholder(int)  # warm-up in the warm start; None: warmup_steps
  # The weights to start from: a run, a Hugging Face folder or hub:NAME[@REVISION], which sets config.model.
  config.warm_start_from = ""  # "": random weights
  config.clip_norm = 1.0  # largest global norm of the gradients; larger ones are scaled down to it
  config.accumulation = 1  # micro-batches per step on each device; may change when a run continues, as sharding may
  config.seed = 0  # seed of initialisation, data order and switching

  config.dtype = placeholder(str)  # of the computation: float32 | bfloat16 | float64; None: bfloat16 on GPUs
  config.param_dtype = "float32"  # of stored parameters and optimizer state; the authors train in bfloat16
  config.frozen_dtype = placeholder(str)  # of stored base kernels: float32 | bfloat16 | int8; None: param_dtype
  config.candidates_dtype = placeholder(str)  # of stored spare vectors: float32 | bfloat16; None: param_dtype
  config.remat = "none"  # recompute in the backward pass: none (norms, scores) | linear (and attention) | full
  config.count_per_element = False  # lora, switchlora: store Adam's step counts per element (App. D); same updates

  config.eval_every = 1000  # steps between evaluations; another one follows the last step
  config.eval_tokens = 10_000_000  # largest number of validation tokens
  config.checkpoint_every = 1000  # steps between checkpoints; another one follows the last step
  config.keep_checkpoints = 3  # number of newest checkpoints to keep
  config.log_every = 10  # steps between writes to metrics.jsonl, which has a line per step
  config.max_skipped = 20  # abort after this number of consecutive steps with a loss or gradient that is not finite
  config.profile_steps = 0  # steps of each command to trace for TensorBoard's profiler, after the first two; 0: none
  config.hang_seconds = 1800.0  # abort when one restore, step, evaluation or save takes more seconds; 0: never

  config.schedule = ConfigDict()
  config.schedule.name = "cosine"  # from the warm-up to the end: cosine | linear | constant | wsd | inverse_sqrt
  config.schedule.decay_share = 0.2  # wsd (warm-up, stable, decay): share of `steps` in which the rate falls linearly

  config.optimizer = ConfigDict()
  config.optimizer.name = "adam"  # adam | muon (linear layers; Adam elsewhere) | lion | sgd; some methods need adam
  config.optimizer.b1 = placeholder(float)  # decay of the first moment or momentum; None: 0.9; muon 0.95, ldadam 0.908
  config.optimizer.b2 = placeholder(float)  # decay of the second moment; None: 0.999; lion, ldadam 0.99
  config.optimizer.eps = placeholder(float)  # added to √(second moment); None: 1e-8; galore, fira, apollo(_mini) 1e-6
  config.optimizer.weight_decay = 0.0  # each step scales weights by 1 - rate · weight_decay; except norms
  config.optimizer.moments_dtype = placeholder(str)  # of stored moments: bfloat16 | None: param_dtype

  config.spike = ConfigDict()  # loss spikes: losses above mean + threshold · standard deviation of the window
  config.spike.window = 128  # number of preceding losses in mean and deviation; no spikes before there are that many
  config.spike.threshold = 6.0  # if the loss stays high, the first window / (1 + threshold²) steps count as spikes
  config.spike.action = "report"  # report | skip (the update) | rollback (to the last checkpoint, with later data)
  config.spike.max_rollbacks = 10  # abort the run after this number of rollbacks

  config.model = ConfigDict()
  config.model.vocab_size = 32_100  # number of token ids; the default is T5's
  config.model.hidden_size = 1024  # width of the residual stream
  config.model.intermediate_size = 2736  # width inside the MLP
  config.model.num_layers = 24  # number of blocks
  config.model.num_heads = 16  # attention heads per block
  config.model.num_kv_heads = placeholder(int)  # key and value heads, a divisor of num_heads; None: num_heads
  config.model.head_dim = placeholder(int)  # size of a head, even; None: hidden_size / num_heads
  config.model.max_position = placeholder(int)  # number of positions, at least seq_len; None: seq_len
  config.model.norm_eps = 1e-6  # ε of RMSNorm
  config.model.tied_embeddings = False  # use the transposed embedding as the head
  config.model.qkv_bias = False  # biases of q, k and v (Qwen 2)
  config.model.qk_norm = False  # an RMSNorm of each head of q and k (Qwen 3)

  config.model.rope = ConfigDict()  # rotary positions
  config.model.rope.base = 10_000.0  # θ
  config.model.rope.scaling = "none"  # none | linear | dynamic | llama3 | yarn, as rope_scaling of `transformers`
  config.model.rope.factor = 1.0  # of the scaling: context length / original context length
  config.model.rope.original_length = 0  # dynamic, llama3, yarn: positions of the original training
  config.model.rope.low_freq_factor = 1.0  # llama3: wavelengths above original_length / low_freq_factor are scaled
  config.model.rope.high_freq_factor = 4.0  # llama3: wavelengths below original_length / high_freq_factor are not
  config.model.rope.beta_fast = 32.0  # yarn: frequencies with more rotations in original_length are not scaled
  config.model.rope.beta_slow = 1.0  # yarn: frequencies with fewer rotations are scaled
  config.model.rope.attention_factor = placeholder(float)  # yarn: scale of rotated q, k; None: 0.1 · ln(factor) + 1

  config.sharding = ConfigDict()  # shardings may change when a run continues; they change only the order of sums
  config.sharding.fsdp = 1  # devices along the mesh's second axis, which `sharded` splits over; must divide all devices
  config.sharding.trained = "sharded"  # trainable parameters: sharded | replicated
  config.sharding.optimizer = "sharded"  # optimizer state: sharded | replicated
  config.sharding.frozen = "replicated"  # base kernels: replicated | sharded
  config.sharding.candidates = "sharded"  # spare vectors: sharded (over all devices) | replicated | host (memory)

  config.switch = ConfigDict()  # settings of switchlora; lora uses `init` as well
  config.switch.interval = 40  # steps between two switches of one vector, at the start of the run; 0: never switch
  config.switch.freeze_steps = 5  # steps for which the counterpart of a switched vector is frozen
  config.switch.decay_point = 0.1  # fraction of `steps` after which the switching rate has fallen to decay_to
  config.switch.decay_to = 1 / 3  # rate at decay_point / rate at the start (0.3 in the authors' code)
  config.switch.decay = "exponential"  # of the switching rate: exponential | learning_rate (proportional to it)
  config.switch.start = 0  # first step that may switch, where the exponential decay starts
  config.switch.init = "switchlora"  # switchlora (eq. 3) | lora (A uniform in ±1/√in, B zero)
  config.switch.candidates = "stored"  # stored (evicted vectors come back) | fresh (new random ones, none are kept)
  config.switch.order = "sequential"  # order in which spare vectors are used: sequential | random (section 2.2)
  config.switch.slots = "sequential"  # which vectors are switched: sequential | snr (those with the noisiest gradients)
  config.switch.min_age = 40  # snr: steps for which a new vector is kept
  config.switch.snr_below = 1.0  # snr: switch vectors whose signal-to-noise ratio is below this multiple of the median
  config.switch.state = "reset"  # optimizer state of the counterpart of a switched vector: reset | keep | transport

  config.relora = ConfigDict()  # settings of relora
  config.relora.restart_every = 5000  # steps between two merges of the adapters into the base kernels
  config.relora.restart_warmup_steps = 100  # steps of linear warm-up after each merge
  config.relora.prune = "random"  # moments that are set to 0 at a merge: random | magnitude (the smallest)
  config.relora.prune_ratio = 0.999  # share of the moments that are set to 0
  config.relora.alpha = 32.0  # the adapter is scaled by alpha / rank

  config.galore = ConfigDict()  # settings of galore
  config.galore.refresh_every = 200  # updates between two computations of the projectors
  config.galore.scale = 0.25  # factor of the update after it is projected back
  config.galore.directions = "svd"  # of the projectors: svd | random | golore (svd, then random) | sara | coordinates
  config.galore.random_share = 0.2  # golore: share of the updates, at the end of the run, with random projectors

  config.fira = ConfigDict()  # settings of fira
  config.fira.refresh_every = 200  # as galore.refresh_every
  config.fira.scale = 0.25  # as galore.scale
  config.fira.directions = "svd"  # as galore.directions
  config.fira.random_share = 0.2  # as galore.random_share
  config.fira.limit = 1.01  # largest norm of the scaled rest / its norm at the previous update; 0: no limit

  config.frugal = ConfigDict()  # settings of frugal
  config.frugal.refresh_every = 200  # as galore.refresh_every
  config.frugal.directions = "svd"  # as galore.directions
  config.frugal.random_share = 0.2  # as galore.random_share
  config.frugal.sign_scale = 1.0  # learning rate of signSGD, for the rest of the gradient / that of Adam

  config.ldadam = ConfigDict()  # settings of ldadam
  config.ldadam.rho = 0.908  # ρ: the projector follows ρ · momentum + (1 - ρ) · gradient
  config.ldadam.error_feedback = True  # keep what the projection loses, in a buffer of the size of the block kernels

  config.sltrain = ConfigDict()  # settings of sltrain
  config.sltrain.density = 0.03  # share of the elements of each kernel that the sparse matrix trains
  config.sltrain.alpha = 32.0  # the low-rank product is scaled by alpha / rank; the authors' example for 60M
  config.sltrain.restart_every = 0  # steps between two restarts, as of factored; 0: never

  config.factored = ConfigDict()  # settings of factored: kernels are low-rank products
  config.factored.restart_every = 200  # steps between two restarts: factors from an SVD, moments 0; 0: never
  config.factored.alpha = 32.0  # the product is scaled by alpha / rank; the authors' example for 60M

  config.apollo = ConfigDict()  # settings of apollo
  config.apollo.refresh_every = 200  # updates between two draws of the random projections
  config.apollo.scale_type = "channel"  # channel (one learning rate per channel, along the larger side) | tensor (one)
  config.apollo.scale = 1.0  # factor of the scaled gradient
  config.apollo.norm_growth = 1.01  # largest ratio of the norms of a kernel's successive updates; 0: no limit

  config.apollo_mini = ConfigDict()  # settings of apollo_mini: apollo with rank 1, scale_type tensor
  config.apollo_mini.refresh_every = 200  # as apollo.refresh_every
  config.apollo_mini.scale = 128**0.5  # as apollo.scale; √128 is its authors' choice
  config.apollo_mini.norm_growth = 1.01  # as apollo.norm_growth

  config.data = ConfigDict()
  config.data.source = "text"  # docs (documentation of the packages) | text (your files) | prepared | stream
  config.data.path = ""  # text, stream: a glob of plain text, JSON lines or Parquet, or hub:NAME; prepared: a folder
  config.data.eval_path = ""  # text, stream: a glob of validation files; "": text holds out the last 1% of the rows
  # Further texts: docs, a prepared folder, a glob or hub:NAME, each after its share of the rows, or a name for metrics.
  config.data.mixture = ""  # texts to train on as well: SHARE=TEXT;…, as in 0.1=old/*.txt; the rest is of `path`
  config.data.eval_also = ""  # texts to evaluate as well: NAME=TEXT;…, as in old=held_out/*.txt
  config.data.field = "text"  # text, stream: JSON key or Parquet column that holds the text
  config.data.bad_rows = "stop"  # text, stream: rows without text end the run (stop) or are counted and left out (skip)
  config.data.packing = "pack"  # documents are joined and cut into rows (pack), or one row each, cut or padded (pad)
  # A SentencePiece model, a tokenizer.json, a folder with one of them, or hub:NAME[@REVISION], a model of the hub.
  # train:SIZE trains a SentencePiece model on the text, train_bytes:SIZE a byte-level tokenizer.json.
  config.data.tokenizer = ""  # "": train:SIZE with the size of the model's vocabulary
  config.data.epochs = 1  # largest number of passes over the training rows; a run that needs more does not start
  config.data.cache_dir = "cache"  # folder of trained tokenizers and packed rows, shared by runs
  return config.lock()
