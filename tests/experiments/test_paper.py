"""The tables and figures as data: the numbers, copied from the paper once more here, and lines that can be run."""

import re

import pytest
from grids import imported

from experiments.common.outcomes import evaluation_step
from experiments.common.trials import first_seed_trials
from experiments.paper import items
from experiments.paper.items import ITEMS, SCALES
from switchlora_jax.config import resolve
from switchlora_jax.training.phases import full_rank_config

TABLE_1 = [  # hidden, heads, layers, batch, batch per GPU, length
  ("130M", 768, 12, 12, 600, 150, 256),
  ("250M", 768, 16, 24, 1152, 72, 512),
  ("350M", 1024, 16, 24, 1152, 72, 512),
  ("1.3B", 2048, 32, 24, 1536, 16, 512),
]
TABLE_2 = {
  ("130M", "full", None): 27.71, ("250M", "full", None): 20.19, ("350M", "full", None): 18.72,
  ("130M", "lora", 128): 34.74, ("250M", "lora", 128): 29.56, ("350M", "lora", 128): 31.87,
  ("130M", "switchlora", 128): 30.26, ("250M", "switchlora", 128): 20.97, ("350M", "switchlora", 128): 19.96,
  ("250M", "switchlora", 256): 19.82, ("350M", "switchlora", 256): 18.70,
}  # fmt: skip
TABLE_3 = {("1.3B", "full", None): 15.23, ("1.3B", "switchlora", 256): 15.89, ("1.3B", "switchlora", 512): 15.01}
TABLE_4 = [
  ("250M, full-rank", "247.5M"), ("250M, rank 128", "98.9M"), ("250M, rank 256", "148.4M"),
  ("350M, full-rank", "368.2M"), ("350M, rank 128", "125.6M"), ("350M, rank 256", "185.4M"),
  ("1.3B, full-rank", "1339.5M"), ("1.3B, rank 256", "370.7M"), ("1.3B, rank 512", "609.7M"),
]  # fmt: skip
TABLE_5 = {  # size, rank, length
  ("350M", 256, 256): (20.29, 19.58),
  ("130M", 256, 256): (26.17, 25.93),
  ("350M", 128, 256): (22.52, 20.93),
  ("350M", 32, 256): (34.09, 25.26),
  ("350M", 256, 512): (19.03, 18.19),
}
GALORE_TABLE_2 = """
  full       34.06 25.08 18.80 15.56
  galore     34.88 25.36 18.95 15.64
  low-rank   78.18 45.51 37.41 142.53
  lora       34.99 33.92 25.58 19.21
  relora     37.04 29.37 29.08 18.33"""
GLUE = {
  "table6": """
    full-rank 42.95±5 87.26±0.2 79.16±1 59.86±1 90.88±0.5
    SwitchLoRA 23.13±15 87.71±0.5 76.86±2 56.24±5 90.83±0.3
    GaLore 40.23±2 86.14±0.5 72.70±4 54.66±4 89.35±0.5""",
  "table7": """
    full-rank 48.60±2 87.64±0.1 78.43±1 58.05±3 91.93±1
    SwitchLoRA 47.43±3 88.49±0.3 80.15±2 61.37±3 92.39±0.5""",
  "table8": """
    full-rank 8e-06 1e-05 1e-05 8e-06 3e-06
    SwitchLoRA 3e-05 5e-05 5e-05 5e-05 1e-05
    GaLore 2e-06 5e-06 5e-06 3e-06 8e-07""",
  "table9": """
    full-rank 8e-06 1e-05 2e-05 1e-05 5e-06
    SwitchLoRA 1e-05 1e-05 1e-05 2e-06 5e-06""",
}
PROTOCOL_RANKS = {"60M": 128, "130M": 256, "350M": 256, "1B": 512}  # of GaLore's Table 2
TRAINED = (
  "table2", "table3", "table5", "table6", "table7", "figure2", "figure3", "figure4", "figure6", "figure7", "figure8",
  "figure9", "figure10", "figure11", "galore_table2",
)  # fmt: skip


def configs(name: str, scale: str) -> dict:
  """{label: resolved config} of what is trained for an item; each a Mapping of flat and nested keys."""
  with imported("reproduce", f"--item={name}", f"--scale={scale}") as reproduce:
    base = items.base_config(scale)
    trials = first_seed_trials(base, reproduce.item_variants(ITEMS[name], base, {}))
  for trial in trials:
    evaluation_step(trial.config, ITEMS[name].read_at)
  return {trial.variant.label: trial.config for trial in trials}


def numbers(name: str) -> dict:
  """{(size, method, rank): the paper's number} of an item's lines."""
  found = {(line.size, line.method, line.rank): line.paper for line in ITEMS[name].lines}
  assert len(found) == len(ITEMS[name].lines)
  return found


def test_every_table_and_figure_is_there():
  """But for the two figures that show no numbers: the method (1) and the road ahead (5). And a table of GaLore's."""
  tables, figures = range(1, 10), (2, 3, 4, 6, 7, 8, 9, 10, 11)
  assert list(ITEMS) == [*(f"table{n}" for n in tables), *(f"figure{n}" for n in figures), "galore_table2"]
  for name, item in ITEMS.items():
    ways = [bool(item.lines), bool(item.study), item.facts is not None, bool(item.used)]
    assert sum(ways) == 1, name
    assert item.title and (name in TRAINED) == bool(item.lines or item.study)


def test_the_papers_numbers_of_what_is_trained():
  assert numbers("table2") == TABLE_2
  assert numbers("table3") == TABLE_3
  galore, same = {("350M", "galore", 256): 21.61}, TABLE_2 | TABLE_3
  switched = {"table6": ("350M", "switchlora", 256), "table7": ("1.3B", "switchlora", 512)}
  for name, last in switched.items():
    full = (last[0], "full", None)
    assert numbers(name) == {full: same[full], last: same[last]} | (galore if name == "table6" else {})
  assert {line.paper for name in TRAINED if "figure" in name for line in ITEMS[name].lines} == {None}
  assert {line.paper for line in ITEMS["table5"].lines} == {number for pair in TABLE_5.values() for number in pair}


def test_the_numbers_of_galores_table_2():
  """All of its rows are listed. Four of its five methods are trained, and SwitchLoRA, which it does not have."""
  rows = [line.split() for line in GALORE_TABLE_2.strip().splitlines()]
  item = ITEMS["galore_table2"]
  assert [[row.pop(""), *row.values()] for row in map(dict, item.paper)] == [
    [method, *map(float, numbers)] for method, *numbers in rows
  ]
  assert {tuple(row) for row in item.paper} == {("", "60M", "130M", "350M", "1B")} and "2403.03507" in item.source
  expected = {
    (size, method): float(number) for method, *row in rows for size, number in zip(PROTOCOL_RANKS, row, strict=True)
  }
  found = {(line.size, line.method): line.paper for line in item.lines}
  trained = {key: number for key, number in expected.items() if key[1] != "low-rank"}
  assert found == trained | {(size, "switchlora"): None for size in PROTOCOL_RANKS}
  assert {other.source for other in ITEMS.values() if other is not item} == {"the paper"}


@pytest.mark.parametrize("scale", SCALES)
def test_galores_table_2_has_its_protocol(scale):
  """At the paper's scale each line is the config of its size with another method; proportions are kept at ours."""
  found = configs("galore_table2", scale)
  for line in ITEMS["galore_table2"].lines:
    config, protocol = found[line.label(scale)], items.load_config(f"protocol.llama_{line.size.lower()}")
    assert config.data.packing == "pad" and config.warmup_steps / config.steps == config.min_lr_ratio == 0.1
    if line.method != "full":
      assert config.rank == PROTOCOL_RANKS[line.size] // (8 if scale == "mini" else 1)
    if line.method == "galore":
      assert config.learning_rate == 1e-2 and config.galore.scale == 0.25
    if scale == "paper":
      assert config.data.path == "data/c4_256_pad"
      resolved = resolve(protocol, 1)
      changed = {"method", "rank", "learning_rate", "rest_learning_rate", "data", "optimizer", "relora"}
      assert {key for key in config if config[key] != resolved[key]} <= changed


def test_table_1_follows_from_the_configs():
  keys = ("size", "hidden", "heads", "layers", "batch", "batch per GPU", "length")
  rows = [dict(zip(keys, row, strict=True)) for row in TABLE_1]
  assert list(ITEMS["table1"].paper) == rows
  assert ITEMS["table1"].facts() == rows


def test_table_4_follows_from_the_configs():
  rows = [{"model": model, "trainable": count} for model, count in TABLE_4]
  assert list(ITEMS["table4"].paper) == rows
  assert ITEMS["table4"].facts() == rows


@pytest.mark.parametrize("name", GLUE)
def test_the_papers_glue(name):
  rows = [line.split() for line in GLUE[name].strip().splitlines()]
  assert [[str(cell) for cell in row.values()] for row in ITEMS[name].paper] == rows
  assert {tuple(row) for row in ITEMS[name].paper} == {("", "CoLA", "STS-B", "MRPC", "RTE", "SST2")}
  assert ITEMS[name].glue == (name in ("table6", "table7")) != bool(ITEMS[name].used)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", TRAINED)
def test_every_line_makes_sense_at_both_scales(name, scale):
  lines = configs(name, scale)
  assert len(lines) == len(ITEMS[name].lines or lines) > (0 if name == "figure10" else 1)
  assert {config.data.source for config in lines.values()} == {"prepared" if scale == "paper" else "docs"}


@pytest.mark.parametrize("name", [name for name in TRAINED if ITEMS[name].lines])
def test_lines_name_what_they_train(name):
  for scale in SCALES:
    found = configs(name, scale)
    for line in ITEMS[name].lines:
      config = found[line.label(scale)]
      assert config.method == line.method
      if line.rank is not None:
        assert config.rank == (line.rank if scale == "paper" else line.rank // 8)
      shape = tuple(config.model[key.removeprefix("model.")] for key in items.SHAPE)
      assert shape == (shape_of(line.size) if scale == "paper" else items.MINI_SHAPES[line.size])


def test_labels_name_what_is_trained_and_what_it_stands_for():
  """Also the steps and lengths in a note, which differ between the scales."""
  for name in [name for name in TRAINED if ITEMS[name].lines]:
    for label, config in configs(name, "mini").items():
      trained, stands_for = re.fullmatch(r"(.*) \(for (.*)\)", label).groups()
      assert trained.startswith(f"{config.model.num_layers} layers × {config.model.hidden_size}, {config.method}")
      assert (f", rank {config.rank}" in trained) == (config.method != "full")
      for number, word in re.findall(r"([\d,]+) full-rank|length (\d+)", trained):
        assert int(number or word) == (config.warm_start_steps if number else config.seq_len)
      assert re.match(r"(60M|130M|250M|350M|1\.3B|1B)", stands_for)
  labels = [line.label("mini") for line in (ITEMS["table2"].lines[-1], ITEMS["figure4"].lines[0])]
  assert labels == [
    "6 layers × 128, switchlora, rank 32 (for 350M, rank 256)",
    "6 layers × 96, relora, rank 16, 150 full-rank steps first (for 250M, rank 128, 5,000 full-rank steps first)",
  ]
  assert ITEMS["figure4"].lines[0].label("paper") == "250M, relora, rank 128, 5,000 full-rank steps first"


def shape_of(size: str) -> tuple:
  of_galore = [("60M", 512, 8, 8), ("1B", 2048, 32, 24)]
  (row,) = (row for row in [*TABLE_1, *of_galore] if row[0] == size)
  middle = {"60M": 1376, "130M": 2048, "250M": 2560, "350M": 2736, "1.3B": 5461, "1B": 5461}[size]
  return row[1], middle, row[3], row[2]


def test_mini_is_an_eighth_of_the_width_and_a_quarter_of_the_depth():
  for size, (hidden, middle, layers, _) in items.MINI_SHAPES.items():
    wide, wide_middle, deep, _ = shape_of(size)
    assert (hidden, layers) == (wide // 8, deep // 4) and 0 <= middle - wide_middle / 8 < 8
    assert items.MINI_SHAPES[size][0] / items.MINI_SHAPES[size][3] % 2 == 0


PERPLEXITIES = ["table2", "table3", "table6", "table7"]


@pytest.mark.parametrize("name", PERPLEXITIES)
def test_perplexity_is_read_at_step_38_000_of_40_000(name):
  for config in configs(name, "paper").values():
    assert config.steps == 40_000 and evaluation_step(config, ITEMS[name].read_at) == 38_000
  assert {ITEMS[other].read_at for other in TRAINED if other not in PERPLEXITIES} == {1.0}


@pytest.mark.parametrize("name", [*PERPLEXITIES, "figure2", "figure3"])
def test_section_4_1(name):
  lines = configs(name, "paper")
  batches = {row[0]: (row[4], row[6]) for row in TABLE_1}
  for line in ITEMS[name].lines:
    config = lines[line.label("paper")]
    assert (config.batch_size, config.seq_len) == batches[line.size]
    assert config.learning_rate == {"full": 1e-3, "lora": 1e-2, "switchlora": 2e-2, "galore": 1e-2}[line.method]
    assert config.min_lr_ratio == (0.1 if line.method == "galore" else 0) and config.galore.refresh_every == 200
    assert (config.warmup_steps, config.eval_every, config.eval_tokens) == (100, 1000, 10**7)
    assert (config.switch.interval, config.switch.freeze_steps, config.switch.decay_point) == (40, 5, 0.1)
    assert config.switch.decay_to == 1 / 3 and config.warm_start_steps == 0


def test_figures_2_and_3_are_the_curves_of_tables_2_and_3():
  lines = lambda *sizes: {key for key in (*TABLE_2, *TABLE_3) if key[0] in sizes}
  assert {*numbers("figure2")} == {key for key in lines("130M", "250M", "350M") if key[2] in (None, 128)}
  assert {*numbers("figure3")} == {key for key in lines("250M", "350M", "1.3B") if key[2] != 128}


def test_figures_10_and_11_are_singular_values_of_350m_at_rank_128():
  assert list(numbers("figure10")) == [("350M", "lora", 128)]
  assert list(numbers("figure11")) == [("350M", "full", None), ("350M", "switchlora", 128)]
  assert [name for name, item in ITEMS.items() if item.spectra] == ["figure10", "figure11"]


def test_figure_4_has_the_settings_of_appendix_c_1():
  lines = configs("figure4", "paper")
  found = [(config.method, config.warm_start_steps) for config in lines.values()]
  assert found == [("relora", 5000), ("relora", 1000), ("switchlora", 1000), ("switchlora", 200)]
  for config in lines.values():
    assert (config.model.hidden_size, config.model.num_layers, config.rank) == (768, 24, 128)
    assert (config.batch_size, config.seq_len) == (1152, 512)
    assert (config.steps, config.min_lr_ratio) == (20_000, 0.1)  # the text calls 20,000 a batch size
    if config.method == "relora":
      assert config.learning_rate == 1e-3 and config.warmup_steps == 500  # the authors' code; the text has 1,000
      assert (config.relora.restart_every, config.relora.restart_warmup_steps) == (5000, 100)
    else:
      assert (config.learning_rate, config.switch.interval, config.warmup_steps) == (1e-2, 40, 1000)


@pytest.mark.parametrize(("scale", "steps", "warmup"), [("paper", 20_000, 1000), ("mini", 600, 30)])
def test_all_lines_of_figure_4_share_their_full_rank_steps(scale, steps, warmup):
  phases = [full_rank_config(config) for config in configs("figure4", scale).values()]
  assert {(phase.learning_rate, phase.warmup_steps, phase.min_lr_ratio, phase.steps) for phase in phases} == {
    (5e-4, warmup, 0, steps)
  }
  read = {*phases[0]} - {"rank", "relora", "switch", "warm_start_from"}  # the rest is for low-rank methods
  assert all(phase[key] == phases[0][key] for phase in phases for key in read)


def test_figure_4_says_where_its_warm_start_is_not_the_authors():
  assert "continuing schedules" in ITEMS["figure4"].title and "warm_start_from" in ITEMS["figure4"].title


def test_figure_4_keeps_its_proportions_at_our_scale():
  pairs = zip(configs("figure4", "paper").values(), configs("figure4", "mini").values(), strict=True)
  for large, small in pairs:
    assert large.warm_start_steps / large.steps == small.warm_start_steps / small.steps
    if large.method == "relora":
      assert large.relora.restart_every / large.steps == small.relora.restart_every / small.steps


def test_table_5_has_the_settings_of_appendix_c_2():
  lines = configs("table5", "paper")
  found = {}
  for line in ITEMS["table5"].lines:
    config = lines[line.label("paper")]
    found.setdefault((line.size, config.rank, config.seq_len), {})[line.method] = line.paper
    assert (config.steps, config.warmup_steps, config.batch_size) == (60_000, 6000, 512)  # the text calls steps a batch
    assert (config.min_lr_ratio, config.learning_rate) == (0.1, {"galore": 1e-2, "switchlora": 2e-2}[line.method])
    assert (config.galore.refresh_every, config.galore.scale, config.switch.interval) == (200, 0.25, 40)
  assert found == {key: {"galore": a, "switchlora": b} for key, (a, b) in TABLE_5.items()}


def test_table_5_changes_the_same_one_thing_at_our_scale():
  lines = configs("table5", "mini")
  found = {(config.method, config.rank, config.seq_len, config.model.num_layers) for config in lines.values()}
  settings = [(32, 64, 6), (32, 64, 3), (16, 64, 6), (4, 64, 6), (32, 128, 6)]
  assert found == {(method, *setting) for method in ("galore", "switchlora") for setting in settings}


@pytest.mark.parametrize("name", ["figure6", "figure7", "figure8", "figure9"])
def test_ablations_are_of_130m_at_rank_128_and_batch_128(name):
  for config in configs(name, "paper").values():
    assert (config.model.hidden_size, config.model.num_layers, config.model.num_heads) == (768, 12, 12)
    assert (config.method, config.rank, config.batch_size, config.seq_len) == ("switchlora", 128, 128, 256)
    assert (config.steps, config.learning_rate) == (40_000, 2e-2)
  for config in configs(name, "mini").values():
    assert (config.model.hidden_size, config.model.num_layers, config.rank) == (96, 3, 16)


def test_ablations_change_what_the_figures_show():
  figure6 = configs("figure6", "paper")
  assert [config.switch.interval for config in figure6.values()] == [10, 20, 40, 80, 160, 0, 40, 40, 40]
  assert [config.switch.decay_point for config in figure6.values()] == [*[0.1] * 6, 0.03, 0.3, 0.9]
  assert len(configs("figure7", "paper")) == 9
  assert [config.switch.freeze_steps for config in configs("figure8", "paper").values()] == [0, 1, 2, 5, 10, 20]
  assert [config.switch.init for config in configs("figure9", "paper").values()] == ["switchlora", "lora"]
