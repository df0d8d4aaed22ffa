"""The tables and figures of the paper as data: the runs of each, at the paper's scale and a small one, and its numbers.

The scale `paper` follows the paper's text. The scale `mini` has an eighth of the width and rank, a quarter of the
depth, and trains on text from the installed packages, so that lines can be compared within minutes. Its labels name
the model that is trained, and then the paper's model that it stands for. A line has no number if the paper only plots
it; settings that the paper does not give are our choice.

`galore_table2` is Table 2 of another paper, GaLore (arXiv 2403.03507), in the protocol of `configs.protocol`. Its
numbers are that paper's.
"""

import importlib
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from experiments.common.trials import BaseConfig, Variant, base_from_file, update_config
from switchlora_jax.config import resolve
from switchlora_jax.parallel.sharding import make_mesh
from switchlora_jax.runs.directory import flatten
from switchlora_jax.training.phases import build_phase
from switchlora_jax.training.report import parameter_count

SCALES = ("mini", "paper")
CONFIGS = {"130M": "llama_130m", "250M": "llama_250m", "350M": "llama_350m", "1.3B": "llama_1b"}
PROTOCOL = {size: f"protocol.llama_{size.lower()}" for size in ("60M", "130M", "350M", "1B")}  # of GaLore's Table 2
MINI = {"steps": 600, "eval_every": 30, "checkpoint_every": 300, "eval_tokens": 100_000}
FINE_TUNING = {  # flags of experiments.finetune_glue
  "mini": {"learning_rates": "1e-4,3e-4,1e-3", "rows": 1000, "epochs": 5, "seeds": 3},
  "paper": {"seeds": 5},
}
MINI_SHAPES = {  # hidden, intermediate, layers, heads
  "60M": (64, 172, 2, 4),
  "130M": (96, 256, 3, 4),
  "250M": (96, 320, 6, 4),
  "350M": (128, 344, 6, 4),
  "1.3B": (256, 688, 6, 8),
  "1B": (256, 688, 6, 8),
}
MINI_MODELS = "models of an eighth of the width and rank and a quarter of the depth"
DOCUMENTS = 46_000_000  # the first documents of C4 that the paper trains on (section 4.1)
TOKENS_PER_DOCUMENT = 498  # of C4 with T5's vocabulary, see docs/data.md
SHAPE = ("model.hidden_size", "model.intermediate_size", "model.num_layers", "model.num_heads")


class Scaled(NamedTuple):
  """A value that differs between the scales."""

  paper: Any
  mini: Any


class Line(NamedTuple):
  """One line of an item: a method on a model size.

  Attributes:
    size: model size as named in the paper. method: see configs/base.py.
    rank: at the paper's scale; an eighth of it at scale `mini`.
    paper: perplexity in the paper, if given.
    changed: further config keys; a `Scaled` has a value per scale.
    note: suffix of the label that distinguishes otherwise equal lines; a `Scaled` if it contains a scaled value.
    config: file in `configs` with the model size and its settings; "": that of `CONFIGS`.
  """

  size: str
  method: str
  rank: int | None = None
  paper: float | None = None
  changed: Mapping[str, Any] = MappingProxyType({})
  note: str | Scaled = ""
  config: str = ""

  def label(self, scale: str) -> str:
    """`350M, switchlora, rank 256`; at scale mini `6 layers × 128, switchlora, rank 32 (for 350M, rank 256)`."""
    note = self.note if isinstance(self.note, Scaled) else Scaled(self.note, self.note)
    join = lambda *words: ", ".join(filter(None, words))
    rank = self.rank and f"rank {self.rank}"
    if scale == "paper":
      return join(self.size, self.method, rank, note.paper)
    hidden, _, layers, _ = MINI_SHAPES[self.size]
    trained = join(f"{layers} layers × {hidden}", self.method, rank and f"rank {self.rank // 8}", note.mini)
    return f"{trained} (for {join(self.size, rank, note.paper if note.paper != note.mini else '')})"


class Item(NamedTuple):
  """A table or a figure: lines to train, or an ablation, or facts that follow from the configs.

  Attributes:
    title: its subject.
    lines: its runs.
    study: names in `studies` of ablations on the 130M model, separated by commas.
    facts: () -> rows of a table that needs no training.
    read_at: fraction of the steps at which the paper reports the perplexity.
    used: where this project uses the paper's rows unchanged.
    paper: the paper's rows, if they are not perplexities of `lines`.
    source: whose numbers they and those of `lines` are.
    spectra: whether it shows singular values of the trained weights.
    glue: whether its runs are fine-tuned on GLUE; `paper` holds the scores.
  """

  title: str
  lines: tuple[Line, ...] = ()
  study: str = ""
  facts: Callable[[], list[dict[str, Any]]] | None = None
  read_at: float = 1.0
  used: str = ""
  paper: tuple[dict[str, Any], ...] = ()
  source: str = "the paper"
  spectra: bool = False
  glue: bool = False


def base_config(scale: str, extra: dict[str, Any] | None = None) -> BaseConfig:
  """The base config of all lines at a scale, with `extra` keys set."""
  name, overrides = ("llama_tiny", MINI) if scale == "mini" else ("llama_350m", {})
  return base_from_file(name, overrides | (extra or {}))


def c4_folder(config) -> str:
  """The folder of C4 for the sequence length and the packing of a config, as the docstrings of the configs name it."""
  return f"data/c4_{config.seq_len}" + ("_pad" if config.data.packing == "pad" else "")


def c4_documents(configs) -> int:
  """Number of documents of C4 to prepare for runs on one folder, and for all models of the papers that use it.

  It is the paper's, or more if a run needs more tokens. With padding it is the number of sequences of the longest run.
  5% are added, since a prepared folder cannot be extended.
  """
  (folder,) = {c4_folder(config) for config in configs}
  models = [c for c in map(load_config, (*CONFIGS.values(), *PROTOCOL.values())) if c4_folder(c) == folder]
  seq_len, packing = configs[0].seq_len, configs[0].data.packing
  if packing == "pad":
    return math.ceil(1.05 * max(config.steps * config.batch_size for config in (*configs, *models)) / 1e6) * 10**6
  tokens = max(config.steps * config.batch_size * seq_len for config in (*configs, *models))
  return max(DOCUMENTS, math.ceil(1.05 * tokens / TOKENS_PER_DOCUMENT / 1e6) * 10**6)


def size_keys(size: str, scale: str, name: str = "") -> dict[str, Any]:
  """The config keys that turn the base config of a scale into a model size of Table 1, or of `configs/{name}.py`."""
  if scale == "mini":
    return dict(zip(SHAPE, MINI_SHAPES[size], strict=True))
  shared, config = (flatten(load_config(file)) for file in ("llama_350m", name or CONFIGS[size]))
  return {key: value for key, value in config.items() if value != shared[key] and key != "rank"}


def load_config(name: str):
  """The config of `configs/{name}.py`."""
  return importlib.import_module(f"configs.{name}").get_config()


def line_variant(line: Line, scale: str) -> Variant:
  """A line as a variant of the base config of a scale."""
  pick = lambda value: getattr(value, scale) if isinstance(value, Scaled) else value
  rank = {} if line.rank is None else {"rank": line.rank if scale == "paper" else line.rank // 8}
  changed = {key: pick(value) for key, value in line.changed.items()}
  return Variant(
    line.label(scale),
    size_keys(line.size, scale, line.config) | {"method": line.method} | rank | changed,
    paper=line.paper,
  )


def model_sizes() -> list[dict[str, Any]]:
  """Table 1, computed from the configs."""
  return [
    {
      "size": size,
      "hidden": config.model.hidden_size,
      "heads": config.model.num_heads,
      "layers": config.model.num_layers,
      "batch": config.batch_size,
      "batch per GPU": config.batch_size // config.accumulation // (4 if size == "130M" else 8),
      "length": config.seq_len,
    }
    for size, config in ((size, load_config(name)) for size, name in CONFIGS.items())
  ]


def trainable_parameters() -> list[dict[str, Any]]:
  """Table 4, computed from the abstract parameters of the models."""
  rows = []
  for size, ranks in {"250M": (128, 256), "350M": (128, 256), "1.3B": (256, 512)}.items():
    for rank in (None, *ranks):
      config = load_config(CONFIGS[size])
      update_config(config, {"method": "full"} if rank is None else {"method": "switchlora", "rank": rank})
      params = build_phase(resolve(config, 1), make_mesh(jax.devices()[:1])).abstract.params
      label = "full-rank" if rank is None else f"rank {rank}"
      rows.append({"model": f"{size}, {label}", "trainable": f"{parameter_count(params) / 1e6:.1f}M"})
  return rows


def with_rank(size: str, *numbers: tuple[str, int | None, float | None]) -> tuple[Line, ...]:
  """Lines of a model size from (method, rank, perplexity in the paper)."""
  return tuple(Line(size, method, rank, paper) for method, rank, paper in numbers)


WARM = dict(  # Appendix C.1; the `warm_start_` keys make the full-rank steps of all lines equal
  steps=Scaled(20_000, 600), warmup_steps=Scaled(1000, 30), min_lr_ratio=0.1,
  warm_start_learning_rate=5e-4, warm_start_warmup_steps=Scaled(1000, 30),
)  # fmt: skip
RELORA = WARM | {
  "warmup_steps": Scaled(500, 15),  # after the full-rank steps, in the authors' code
  "relora.alpha": Scaled(32.0, 4.0),  # equal α / r
  "relora.restart_every": Scaled(5000, 150),
  "relora.restart_warmup_steps": Scaled(100, 15),
  "learning_rate": 1e-3,
}
GALORE = dict(  # section 4.3 and Appendix C.2
  steps=Scaled(60_000, 600),
  warmup_steps=Scaled(6000, 60),
  batch_size=Scaled(512, 8),
  seq_len=Scaled(256, 64),
  min_lr_ratio=0.1,
)
REFRESH = {"galore.refresh_every": Scaled(200, 20), "learning_rate": 1e-2}


def warm(method: str, paper_steps: int, mini_steps: int) -> Line:
  """A line of Figure 4: a method after a number of full-rank steps."""
  own = RELORA if method == "relora" else WARM | {"learning_rate": 1e-2}
  changed = own | {"warm_start_steps": Scaled(paper_steps, mini_steps)}
  note = Scaled(*(f"{steps:,} full-rank steps first" for steps in (paper_steps, mini_steps)))
  return Line("250M", method, 128, None, changed, note)


def against_galore(
  note: str | Scaled, galore: float, switchlora: float, size="350M", rank=256, **changed
) -> tuple[Line, ...]:
  """The two lines in one column of Table 5."""
  changed = GALORE | changed
  return (
    Line(size, "galore", rank, galore, changed | REFRESH, note),
    Line(size, "switchlora", rank, switchlora, changed | {"learning_rate": 2e-2}, note),
  )


def in_protocol(size: str, **perplexities: float) -> tuple[Line, ...]:
  """The lines of a model size in GaLore's Table 2, and SwitchLoRA, from {method: perplexity in that paper}.

  The number of steps between ReLoRA's restarts, and SwitchLoRA's settings, are our choice.
  """
  config = load_config(PROTOCOL[size])
  shared = dict(
    steps=Scaled(config.steps, 600),
    warmup_steps=Scaled(config.warmup_steps, 60),
    batch_size=Scaled(config.batch_size, 8),
    seq_len=Scaled(config.seq_len, 64),
    min_lr_ratio=config.min_lr_ratio,
  ) | {"data.packing": config.data.packing, "data.epochs": Scaled(1, 5)}  # mini: of 1,600 documents, 4,800 rows
  restarts = {"relora.restart_every": Scaled(config.steps // 5, 120), "relora.restart_warmup_steps": Scaled(100, 15)}
  own = {"relora": restarts | {"relora.alpha": Scaled(32.0, 4.0)}, "galore": REFRESH}
  return tuple(
    Line(
      size,
      method,
      None if method == "full" else config.rank,
      perplexities.get(method),
      shared | own.get(method, {}),
      config=PROTOCOL[size],
    )
    for method in ("full", "galore", "lora", "relora", "switchlora")
  )


TABLE_2 = {
  "130M": with_rank("130M", ("full", None, 27.71), ("lora", 128, 34.74), ("switchlora", 128, 30.26)),
  "250M": with_rank("250M", ("full", None, 20.19), ("lora", 128, 29.56), ("switchlora", 128, 20.97)),
  "350M": with_rank("350M", ("full", None, 18.72), ("lora", 128, 31.87), ("switchlora", 128, 19.96)),
}
HIGHER = {
  "250M": with_rank("250M", ("switchlora", 256, 19.82)),
  "350M": with_rank("350M", ("switchlora", 256, 18.70)),
}
TABLE_3 = with_rank("1.3B", ("full", None, 15.23), ("switchlora", 256, 15.89), ("switchlora", 512, 15.01))
RANK_128 = (*TABLE_2["130M"], *TABLE_2["250M"], *TABLE_2["350M"])
# Section 4.4: GaLore with the batch size, sequence length and rank of SwitchLoRA. The paper does not give steps and
# warm-up; SwitchLoRA's are used, so that all lines have the same token budget.
PRETRAINED_350M = (TABLE_2["350M"][0], *HIGHER["350M"], Line("350M", "galore", 256, 21.61, REFRESH))
GLUE = ("CoLA", "STS-B", "MRPC", "RTE", "SST2")


def glue_row(label: str, *scores) -> dict[str, Any]:
  """A row of a GLUE table."""
  return {"": label} | dict(zip(GLUE, scores, strict=True))


GALORE_TABLE_2 = {  # perplexities of the GaLore paper at the sizes of PROTOCOL; low-rank trains W = BA alone
  "full": (34.06, 25.08, 18.80, 15.56),
  "galore": (34.88, 25.36, 18.95, 15.64),
  "low-rank": (78.18, 45.51, 37.41, 142.53),
  "lora": (34.99, 33.92, 25.58, 19.21),
  "relora": (37.04, 29.37, 29.08, 18.33),
}

ITEMS = {
  "table1": Item("model sizes", facts=model_sizes, paper=(
    dict(size="130M", hidden=768, heads=12, layers=12, batch=600, **{"batch per GPU": 150}, length=256),
    dict(size="250M", hidden=768, heads=16, layers=24, batch=1152, **{"batch per GPU": 72}, length=512),
    dict(size="350M", hidden=1024, heads=16, layers=24, batch=1152, **{"batch per GPU": 72}, length=512),
    dict(size="1.3B", hidden=2048, heads=32, layers=24, batch=1536, **{"batch per GPU": 16}, length=512),
  )),
  "table2": Item("perplexity at 38,000 of 40,000 steps", (*RANK_128, *HIGHER["250M"], *HIGHER["350M"]), read_at=0.95),
  "table3": Item("perplexity of 1.3B at 38,000 of 40,000 steps", TABLE_3, read_at=0.95),
  "table4": Item("trainable parameters", facts=trainable_parameters, paper=tuple(
    dict(model=model, trainable=count)
    for model, count in (
      ("250M, full-rank", "247.5M"), ("250M, rank 128", "98.9M"), ("250M, rank 256", "148.4M"),
      ("350M, full-rank", "368.2M"), ("350M, rank 128", "125.6M"), ("350M, rank 256", "185.4M"),
      ("1.3B, full-rank", "1339.5M"), ("1.3B, rank 256", "370.7M"), ("1.3B, rank 512", "609.7M"),
    )
  )),
  "table5": Item("GaLore and SwitchLoRA", (
    *against_galore("standard", 20.29, 19.58),
    *against_galore("", 26.17, 25.93, size="130M"),
    *against_galore("", 22.52, 20.93, rank=128),
    *against_galore("", 34.09, 25.26, rank=32),
    *against_galore(Scaled("length 512", "length 128"), 19.03, 18.19, seq_len=Scaled(512, 128)),
  )),
  "table6": Item("GLUE after pre-training 350M", PRETRAINED_350M, read_at=0.95, glue=True, paper=(
    glue_row("full-rank", "42.95±5", "87.26±0.2", "79.16±1", "59.86±1", "90.88±0.5"),
    glue_row("SwitchLoRA", "23.13±15", "87.71±0.5", "76.86±2", "56.24±5", "90.83±0.3"),
    glue_row("GaLore", "40.23±2", "86.14±0.5", "72.70±4", "54.66±4", "89.35±0.5"),
  )),
  "table7": Item("GLUE after pre-training 1.3B", TABLE_3[::2], read_at=0.95, glue=True, paper=(
    glue_row("full-rank", "48.60±2", "87.64±0.1", "78.43±1", "58.05±3", "91.93±1"),
    glue_row("SwitchLoRA", "47.43±3", "88.49±0.3", "80.15±2", "61.37±3", "92.39±0.5"),
  )),
  "table8": Item("learning rates for GLUE, 350M; batch 16, 30 epochs, length 512", used=(
    "experiments.finetune_glue uses them by default for models nearer to 350M, and for GaLore models of any size"
  ), paper=(
    glue_row("full-rank", 8e-6, 1e-5, 1e-5, 8e-6, 3e-6),
    glue_row("SwitchLoRA", 3e-5, 5e-5, 5e-5, 5e-5, 1e-5),
    glue_row("GaLore", 2e-6, 5e-6, 5e-6, 3e-6, 8e-7),
  )),
  "table9": Item("learning rates for GLUE, 1.3B; batch 16, 30 epochs, length 512", used=(
    "experiments.finetune_glue uses them by default for models nearer to 1.3B than to 350M"
  ), paper=(
    glue_row("full-rank", 8e-6, 1e-5, 2e-5, 1e-5, 5e-6),
    glue_row("SwitchLoRA", 1e-5, 1e-5, 1e-5, 2e-6, 5e-6),
  )),
  "figure2": Item("loss of 130M, 250M and 350M at rank 128", tuple(line._replace(paper=None) for line in RANK_128)),
  "figure3": Item("loss of 250M, 350M and 1.3B at higher ranks", tuple(
    line._replace(paper=None)
    for line in (TABLE_2["250M"][0], *HIGHER["250M"], TABLE_2["350M"][0], *HIGHER["350M"], *TABLE_3)
  )),
  "figure4": Item("ReLoRA and SwitchLoRA after a full-rank warm start: ours within one run, with continuing schedules; "
                  "the authors' from a stopped full-rank run, with new schedules (warm_start_from)", (
    warm("relora", 5000, 150), warm("relora", 1000, 30), warm("switchlora", 1000, 30), warm("switchlora", 200, 6),
  )),
  "figure6": Item("interval and ratio, one at a time", study="interval,ratio"),
  "figure7": Item("interval and ratio together", study="grid"),
  "figure8": Item("number of steps for which a counterpart is frozen", study="freeze"),
  "figure9": Item("initialisation", study="init"),
  "figure10": Item("singular values after LoRA", (TABLE_2["350M"][1]._replace(paper=None),), spectra=True),
  "figure11": Item("singular values after full-rank training and SwitchLoRA", tuple(
    TABLE_2["350M"][n]._replace(paper=None) for n in (0, 2)
  ), spectra=True),
  "galore_table2": Item("perplexity at the last step in GaLore's protocol", tuple(
    line
    for n, size in enumerate(PROTOCOL)
    for line in in_protocol(size, **{method: row[n] for method, row in GALORE_TABLE_2.items()})
  ), source="the GaLore paper (arXiv 2403.03507, Table 2)", paper=tuple(
    {"": method} | dict(zip(PROTOCOL, row, strict=True)) for method, row in GALORE_TABLE_2.items()
  )),
}  # fmt: skip
