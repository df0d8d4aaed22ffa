"""Every table and figure of the paper as data: what is trained, at its scale and at ours, and its numbers.

The paper's scale is that of its text. `mini` is an eighth of the width and of the rank, a quarter of the depth, and a
text that comes with the packages, so that the relations between the lines can be looked at in minutes. Where a
figure's curves are not in the text, its lines have no number; where its values are not, they are ours.
"""

import importlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from experiments.common.grid import Arm
from experiments.common.settings import Base, base_from_file, update
from switchlora_jax.config import resolve
from switchlora_jax.parallel.sharding import make_mesh
from switchlora_jax.runs.directory import flatten
from switchlora_jax.training.phases import build_phase
from switchlora_jax.training.report import parameter_count

SCALES = ("mini", "paper")
CONFIGS = {"130M": "llama_130m", "250M": "llama_250m", "350M": "llama_350m", "1.3B": "llama_1b"}
MINI = {"steps": 600, "eval_every": 30, "checkpoint_every": 300, "eval_tokens": 100_000}
FINE_TUNING = {  # flags of finetune_glue
  "mini": {"learning_rates": "1e-4,3e-4,1e-3", "rows": 1000, "epochs": 5, "seeds": 3},
  "paper": {"seeds": 5},
}
MINI_SHAPES = {  # hidden, intermediate, layers, heads
  "130M": (96, 256, 3, 4),
  "250M": (96, 320, 6, 4),
  "350M": (128, 344, 6, 4),
  "1.3B": (256, 688, 6, 8),
}
SHAPE = ("model.hidden_size", "model.intermediate_size", "model.num_layers", "model.num_heads")


class Scaled(NamedTuple):
  """A value that differs between the scales."""

  paper: Any
  mini: Any


class Line(NamedTuple):
  """One line of an item: a method on a size of model.

  Attributes:
    size: of the model, as the paper calls it. method: see configs/base.py.
    rank: at the paper's scale; an eighth of it at ours.
    paper: its number in the paper.
    changed: other keys, each a value for both scales or a `Scaled`.
    note: what tells it from lines that are else alike.
  """

  size: str
  method: str
  rank: int | None = None
  paper: float | None = None
  changed: Mapping[str, Any] = MappingProxyType({})
  note: str = ""

  @property
  def label(self) -> str:
    """`250M, switchlora, rank 128`: at the paper's scale, at either."""
    return ", ".join(filter(None, (self.size, self.method, self.rank and f"rank {self.rank}", self.note)))


class Item(NamedTuple):
  """A table or a figure: lines that are trained, or an ablation, or facts that follow from the configs.

  Attributes:
    title: what it shows.
    lines: what is trained for it.
    study: the ablation it is, by its name in `studies`, on the 130M model.
    facts: () -> rows of a table that no training stands behind.
    read_at: the fraction of the steps at which the paper reads it.
    used: what here takes the paper's rows as they are.
    paper: the paper's own rows, where they are not numbers of lines.
    spectra: whether it shows singular values of what was trained.
    glue: whether what was trained is then fine-tuned on GLUE, of which the paper's rows are.
  """

  title: str
  lines: tuple[Line, ...] = ()
  study: str = ""
  facts: Callable[[], list[dict[str, Any]]] | None = None
  read_at: float = 1.0
  used: str = ""
  paper: tuple[dict[str, Any], ...] = ()
  spectra: bool = False
  glue: bool = False


def base(scale: str, extra: dict[str, Any] | None = None) -> Base:
  """What the lines of a scale share; `extra` keys, if any, changed against it."""
  name, overrides = ("llama_tiny", MINI) if scale == "mini" else ("llama_350m", {})
  return base_from_file(name, overrides | (extra or {}))


def size_keys(size: str, scale: str) -> dict[str, Any]:
  """The keys that make the base of a scale a model of a size of Table 1."""
  if scale == "mini":
    return dict(zip(SHAPE, MINI_SHAPES[size], strict=True))
  shared, config = (flatten(load(name)) for name in ("llama_350m", CONFIGS[size]))
  return {key: value for key, value in config.items() if value != shared[key] and key != "rank"}


def load(name: str):
  """The config of a file in configs/."""
  return importlib.import_module(f"configs.{name}").get_config()


def arm(line: Line, scale: str) -> Arm:
  """A line as an arm over the base of a scale."""
  pick = lambda value: getattr(value, scale) if isinstance(value, Scaled) else value
  rank = {} if line.rank is None else {"rank": line.rank if scale == "paper" else line.rank // 8}
  changed = {key: pick(value) for key, value in line.changed.items()}
  return Arm(line.label, size_keys(line.size, scale) | {"method": line.method} | rank | changed, paper=line.paper)


def sizes() -> list[dict[str, Any]]:
  """Table 1, from the configs."""
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
    for size, config in ((size, load(name)) for size, name in CONFIGS.items())
  ]


def trainable() -> list[dict[str, Any]]:
  """Table 4, counted from the models' own abstract parameters."""
  rows = []
  for size, ranks in {"250M": (128, 256), "350M": (128, 256), "1.3B": (256, 512)}.items():
    for rank in (None, *ranks):
      config = load(CONFIGS[size])
      update(config, {"method": "full"} if rank is None else {"method": "switchlora", "rank": rank})
      params = build_phase(resolve(config, 1), make_mesh(jax.devices()[:1])).abstract.params
      label = "full-rank" if rank is None else f"rank {rank}"
      rows.append({"model": f"{size}, {label}", "trainable": f"{parameter_count(params) / 1e6:.1f}M"})
  return rows


def with_rank(size: str, *numbers: tuple[str, int | None, float | None]) -> tuple[Line, ...]:
  """Lines of a size from (method, rank, paper's number)."""
  return tuple(Line(size, method, rank, paper) for method, rank, paper in numbers)


WARM = dict(  # Appendix C.1; what starts with `warm_start_` makes the full-rank steps of all lines the same
  steps=Scaled(20_000, 600), warmup_steps=Scaled(1000, 30), min_lr_ratio=0.1,
  warm_start_learning_rate=5e-4, warm_start_warmup_steps=Scaled(1000, 30),
)  # fmt: skip
RELORA = WARM | {
  "warmup_steps": Scaled(500, 15),  # at the hand-over, in the authors' code
  "relora.alpha": Scaled(32.0, 4.0),  # the same scale α / r
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
  """A line of Figure 4: a method after so many full-rank steps."""
  own = RELORA if method == "relora" else WARM | {"learning_rate": 1e-2}
  changed = own | {"warm_start_steps": Scaled(paper_steps, mini_steps)}
  return Line("250M", method, 128, None, changed, f"{paper_steps:,} full-rank steps first")


def against_galore(note: str, galore: float, switchlora: float, size="350M", rank=256, **changed) -> tuple[Line, ...]:
  """The two lines of a column of Table 5."""
  changed = GALORE | changed
  return (
    Line(size, "galore", rank, galore, changed | REFRESH, note),
    Line(size, "switchlora", rank, switchlora, changed | {"learning_rate": 2e-2}, note),
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
# Section 4.4: GaLore with the batch, length and rank of SwitchLoRA. Steps and warm-up are not said: they are taken to
# be SwitchLoRA's too, so that all have seen as many tokens.
PRETRAINED_350M = (TABLE_2["350M"][0], *HIGHER["350M"], Line("350M", "galore", 256, 21.61, REFRESH))
GLUE = ("CoLA", "STS-B", "MRPC", "RTE", "SST2")


def glue(label: str, *scores) -> dict[str, Any]:
  """A row of a GLUE table."""
  return {"": label} | dict(zip(GLUE, scores, strict=True))


ITEMS = {
  "table1": Item("model sizes", facts=sizes, paper=(
    dict(size="130M", hidden=768, heads=12, layers=12, batch=600, **{"batch per GPU": 150}, length=256),
    dict(size="250M", hidden=768, heads=16, layers=24, batch=1152, **{"batch per GPU": 72}, length=512),
    dict(size="350M", hidden=1024, heads=16, layers=24, batch=1152, **{"batch per GPU": 72}, length=512),
    dict(size="1.3B", hidden=2048, heads=32, layers=24, batch=1536, **{"batch per GPU": 16}, length=512),
  )),
  "table2": Item("perplexity at 38,000 of 40,000 steps", (*RANK_128, *HIGHER["250M"], *HIGHER["350M"]), read_at=0.95),
  "table3": Item("perplexity of 1.3B at 38,000 of 40,000 steps", TABLE_3, read_at=0.95),
  "table4": Item("trainable parameters", facts=trainable, paper=tuple(
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
    *against_galore("length 512", 19.03, 18.19, seq_len=Scaled(512, 128)),
  )),
  "table6": Item("GLUE after pre-training 350M", PRETRAINED_350M, read_at=0.95, glue=True, paper=(
    glue("full-rank", "42.95±5", "87.26±0.2", "79.16±1", "59.86±1", "90.88±0.5"),
    glue("SwitchLoRA", "23.13±15", "87.71±0.5", "76.86±2", "56.24±5", "90.83±0.3"),
    glue("GaLore", "40.23±2", "86.14±0.5", "72.70±4", "54.66±4", "89.35±0.5"),
  )),
  "table7": Item("GLUE after pre-training 1.3B", TABLE_3[::2], read_at=0.95, glue=True, paper=(
    glue("full-rank", "48.60±2", "87.64±0.1", "78.43±1", "58.05±3", "91.93±1"),
    glue("SwitchLoRA", "47.43±3", "88.49±0.3", "80.15±2", "61.37±3", "92.39±0.5"),
  )),
  "table8": Item("learning rates for GLUE, 350M; batch 16, 30 epochs, length 512", used=(
    "experiments.finetune_glue takes them by default for models nearer to 350M, and for GaLore's of any size"
  ), paper=(
    glue("full-rank", 8e-6, 1e-5, 1e-5, 8e-6, 3e-6),
    glue("SwitchLoRA", 3e-5, 5e-5, 5e-5, 5e-5, 1e-5),
    glue("GaLore", 2e-6, 5e-6, 5e-6, 3e-6, 8e-7),
  )),
  "table9": Item("learning rates for GLUE, 1.3B; batch 16, 30 epochs, length 512", used=(
    "experiments.finetune_glue takes them by default for models nearer to 1.3B than to 350M"
  ), paper=(
    glue("full-rank", 8e-6, 1e-5, 2e-5, 1e-5, 5e-6),
    glue("SwitchLoRA", 1e-5, 1e-5, 1e-5, 2e-6, 5e-6),
  )),
  "figure2": Item("loss of 130M, 250M and 350M at rank 128", tuple(line._replace(paper=None) for line in RANK_128)),
  "figure3": Item("loss of 250M, 350M and 1.3B at higher ranks", tuple(
    line._replace(paper=None)
    for line in (TABLE_2["250M"][0], *HIGHER["250M"], TABLE_2["350M"][0], *HIGHER["350M"], *TABLE_3)
  )),
  "figure4": Item("ReLoRA and SwitchLoRA after a full-rank warm start: ours within one run, whose clocks go on; "
                  "the authors' from a stopped full-rank run, all clocks anew (warm_start_from)", (
    warm("relora", 5000, 150), warm("relora", 1000, 30), warm("switchlora", 1000, 30), warm("switchlora", 200, 6),
  )),
  "figure6": Item("interval and ratio, one at a time", study="interval,ratio"),
  "figure7": Item("interval and ratio together", study="grid"),
  "figure8": Item("steps for which a counterpart is frozen", study="freeze"),
  "figure9": Item("initialisation", study="init"),
  "figure10": Item("singular values after LoRA", (TABLE_2["350M"][1]._replace(paper=None),), spectra=True),
  "figure11": Item("singular values after full-rank training and SwitchLoRA", tuple(
    TABLE_2["350M"][n]._replace(paper=None) for n in (0, 2)
  ), spectra=True),
}  # fmt: skip
