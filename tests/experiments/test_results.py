"""Output files of a sweep: numbers, table and figures."""

import json
import math
import re
import shutil

import jax
import numpy as np
import pytest
from grids import fake_runs, fake_text, tiny_base, write_run
from matplotlib import pyplot as plt
from scipy import stats

from experiments.common import results, results_figures, sweep
from experiments.common.figures import line_style, save_figure
from experiments.common.outcomes import TrialResult
from experiments.common.results_figures import plot_curves, plot_parameters, plot_rates, swept_rows
from experiments.common.results_table import format_perplexity, markdown, results_table
from experiments.common.trials import Variant, make_trial
from switchlora_jax.errors import UserError

FULL = Variant("full", {"method": "full"}, paper=27.71)
SWITCH = Variant("switchlora, rank 4", {"method": "switchlora"}, (1e-2, 2e-2, 5e-2))
LORA = Variant("lora, rank 4", {"method": "lora"})
ARMS = (FULL, SWITCH, LORA)
OPTIONS = {"seeds": 3, "processes": 2, "read_at": 1.0}


@pytest.fixture
def runs(monkeypatch):
  return fake_runs(monkeypatch)


def perplexities(*values):
  return [math.log(value) for value in values]


@pytest.fixture
def ran(tmp_path, runs):
  """Three variants and three seeds: full rank, SwitchLoRA with a sweep that is best in its middle, LoRA that fails."""
  full, switched = perplexities(10, 12, 17), perplexities(20, 24, 22)
  runs.losses = {f"full_lr=0.001_seed={seed}": loss for seed, loss in enumerate(full)}
  runs.losses |= {f"switchlora-rank-4_lr=0.02_seed={seed}": loss for seed, loss in enumerate(switched)}
  runs.losses |= {"switchlora-rank-4_lr=0.01": math.log(21), "switchlora-rank-4_lr=0.05": float("nan")}
  runs.broken = {"lora-rank-4_lr=0.01_seed=0"}
  return sweep.run_sweep(tiny_base(tmp_path), ARMS, workdir=tmp_path, **OPTIONS)


@pytest.fixture
def found(ran):
  return results.collect(ARMS, ran, 1.0, {"full": 1.0, "switchlora, rank 4": 0.8125})


def test_rows_against_numbers_by_hand(found):
  full, switched, lora = found["arms"]
  assert full["perplexities"] == pytest.approx([10, 12, 17])
  assert full["mean"] == pytest.approx(13) and full["std"] == pytest.approx(math.sqrt((9 + 1 + 16) / 2))
  assert switched["perplexities"] == pytest.approx([20, 24, 22]) and switched["std"] == pytest.approx(2)
  assert switched["learning_rate"] == 2e-2  # though the mean of its seeds, 22, is above 21
  assert switched["sweep"] == {"0.01": pytest.approx(21), "0.02": pytest.approx(20), "0.05": None}
  assert (full["paper"], switched["paper"], full["step_time"], switched["step_time"]) == (27.71, None, 1.0, 0.8125)
  assert lora["mean"] is lora["std"] is lora["learning_rate"] is None and lora["perplexities"] == []


def test_sizes_against_numbers_by_hand(found):
  """Two blocks of width 16 and 24, vocabulary 320, rank 4; per parameter two moments, per vector or leaf a count."""
  full, switched, lora = found["arms"]
  others = 2 * 320 * 16 + 5 * 16  # embedding, head, two norms a block and the last
  vectors = 2 * 4 * (4 * (16 + 16) + 3 * (16 + 24))
  assert full["trainable_parameters"] == others + 2 * (4 * 16 * 16 + 3 * 16 * 24)
  assert switched["trainable_parameters"] == lora["trainable_parameters"] == others + vectors
  assert 0 < switched["optimizer_bytes"] - 8 * (others + vectors) < 4 * (2 * 7 * 2 * 4 + 10)
  assert full["candidates_cycled"] is lora["candidates_cycled"] is None
  # r / (c - r) · Σ d^((t+1) / (p·T)) / interval
  assert switched["candidates_cycled"] == pytest.approx(4 / 12 / 2 * sum(3 ** (-t / 1.2) for t in range(1, 13)))


def test_the_table(found):
  text = results_table(found)
  header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.strip().splitlines()]
  assert header == [
    "",
    "validation perplexity",
    "learning rate",
    "rates tried",
    "tokens",
    "trainable parameters",
    "optimizer, MiB",
    "all state, MiB",
    "gradients, MiB",
    "step time / full rank",
    "candidates cycled",
    "paper",
  ]
  assert rows[0][:6] == ["full", "13.00 ± 3.61 (3 seeds)", "0.001", "", "1,536", "14,672"]
  assert rows[0][8:] == ["0.06", "1.00", "", "27.71"]
  assert rows[1][:4] == ["switchlora, rank 4", "22.00 ± 2.00 (3 seeds)", "0.02", "3"] and rows[1][9] == "0.81"
  assert rows[2][:3] == ["lora, rank 4", "failed", ""]
  assert "†" not in text


def test_warnings_of_a_method_follow_the_table(tmp_path, runs):
  variant = Variant("relora, rank 4", {"method": "relora", "relora.restart_every": 100})
  ran = sweep.run_sweep(tiny_base(tmp_path), (variant,), workdir=tmp_path, **OPTIONS | {"seeds": 1})
  text = results_table(results.collect((variant,), ran, 1.0))
  assert "\nrelora, rank 4: WARNING: without a restart this is LoRA;" in text


def test_empty_columns_are_left_out(ran):
  variants = [FULL._replace(paper=None), LORA]
  same = [r._replace(trial=r.trial._replace(variant=variants[0])) for r in ran if r.trial.variant is FULL]
  text = results_table(results.collect(variants, same + [r for r in ran if r.trial.variant is LORA], 1.0))
  header = text.splitlines()[0]
  columns = "trainable parameters | optimizer, MiB | all state, MiB | gradients, MiB |"
  assert header == f"|  | validation perplexity | learning rate | tokens | {columns}"


@pytest.mark.parametrize(("best", "dagger"), [("0.01", True), ("0.02", False), ("0.05", True)])
def test_a_dagger_at_the_edge_of_a_sweep(tmp_path, runs, best, dagger):
  runs.losses = {f"switchlora-rank-4_lr={best}": 2.0}
  options = OPTIONS | {"seeds": 1}
  text = results_table(
    results.collect((SWITCH,), sweep.run_sweep(tiny_base(tmp_path), (SWITCH,), workdir=tmp_path, **options), 1.0)
  )
  assert (f"| 7.39 | {best}† |" in text) == dagger and (f"| 7.39 | {best} |" in text) != dagger
  assert ("† best learning rate at the edge of the sweep" in text) == dagger


def test_one_learning_rate_has_no_edge_and_one_seed_no_spread(tmp_path, runs):
  variant = SWITCH._replace(learning_rates=(1e-2,))
  ran = sweep.run_sweep(tiny_base(tmp_path), (variant,), workdir=tmp_path, **OPTIONS | {"seeds": 1})
  row = results.collect((variant,), ran, 1.0)["arms"][0]
  assert row["std"] is None and not row["at_edge_of_sweep"] and format_perplexity(row) == "20.09"


@pytest.mark.parametrize(
  ("losses", "shown"),
  [
    ((2.0, 2.0, float("nan")), "7.39 ± 0.00 (2 of 3 seeds)"),
    ((2.0, 800.0, float("nan")), "7.39 (1 of 3 seeds)"),
    ((float("nan"), 2.0, 2.0), "failed"),  # its first seed: nothing was chosen, and no other seed run
  ],
)
def test_seeds_that_diverged_are_not_hidden(tmp_path, runs, losses, shown):
  runs.losses = {f"lora-rank-4_lr=0.01_seed={seed}": loss for seed, loss in enumerate(losses)}
  ran = sweep.run_sweep(tiny_base(tmp_path), (LORA,), workdir=tmp_path, **OPTIONS)
  assert format_perplexity(results.collect((LORA,), ran, 1.0)["arms"][0]) == shown


def test_failures_are_an_error_after_all_files_are_written(tmp_path, ran, capsys):
  with pytest.raises(UserError) as caught:
    results.conclude(ARMS, ran, OPTIONS | {"workdir": tmp_path}, "three methods")
  sentence = "1 of 9 runs failed: lora-rank-4_lr=0.01_seed=0; repeat the same command to run only these again"
  assert str(caught.value) == sentence
  written = {path.name for path in tmp_path.iterdir()}
  assert {"results.json", "table.md", "curves.png", "curves.svg", "parameters.png", "parameters.svg"} <= written
  assert (tmp_path / "table.md").read_text() in capsys.readouterr().out
  results.conclude((FULL,), [r for r in ran if r.trial.variant is FULL], OPTIONS | {"workdir": tmp_path}, "full rank")


def test_results_json_is_strict_and_has_every_trial(tmp_path, found):
  def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")

  results.write_results(found, tmp_path, "three methods")
  loaded = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
  assert loaded == json.loads(json.dumps(found))
  trials = {trial["name"]: trial for trial in loaded["cells"]}
  assert len(trials) == len(loaded["cells"]) == 9
  diverged, failed = trials["switchlora-rank-4_lr=0.05_seed=0"], trials["lora-rank-4_lr=0.01_seed=0"]
  assert diverged["val_loss"] is None and diverged["curve"] == [[4, None], [8, None], [12, None]]
  assert failed["val_loss"] is None and failed["curve"] == [] and "error: what went wrong" in failed["failure"]
  good = trials["full_lr=0.001_seed=2"]
  assert (good["seed"], good["learning_rate"], good["label"], good["failure"]) == (2, 1e-3, "full", None)
  assert good["val_loss"] == pytest.approx(math.log(17))
  assert [step for step, _ in good["curve"]] == [4, 8, 12] and good["curve"][-1][1] == good["val_loss"]


def test_learnt_ranks_are_kept(tmp_path, runs):
  base = tiny_base(tmp_path)
  trial = make_trial(base, FULL, None, 0)
  workdir = tmp_path / "run"
  write_run(workdir, trial.config, {12: 3.0})
  path = workdir / "metrics.jsonl"
  path.write_text(json.dumps({"step": 12, "val_loss": 3.0, "val_ppl": 20.1, "learnt_rank": 5.5}) + "\n")
  found = results.collect((FULL,), [TrialResult(trial, workdir, None)], 1.0)
  assert found["cells"][0]["learnt_rank"] == [[12, 5.5]]


def test_further_validation_texts_have_a_column(tmp_path, runs):
  """Means over the seeds at the best rate; a value that is not finite is left out."""
  base, ran = tiny_base(tmp_path), []
  for seed, old in enumerate((8.0, 9.0, None)):
    trial, workdir = make_trial(base, FULL, None, seed), tmp_path / str(seed)
    write_run(workdir, trial.config, {12: 3.0})
    row = {"step": 12, "val_loss": 3.0, "val_ppl": 20.1, "val_ppl/old": old, "val_ppl/code": 5.0}
    (workdir / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    ran.append(TrialResult(trial, workdir, None))
  found = results.collect((FULL,), ran, 1.0)
  assert found["cells"][1]["further"] == {"old": [[12, 9.0]], "code": [[12, 5.0]]}
  assert "| old 8.50 ± 0.71 (2 of 3 seeds), code 5.00 ± 0.00 |" in results_table(found)
  again = [TrialResult(one.trial, one.workdir, None, cell) for one, cell in zip(ran, found["cells"], strict=True)]
  assert results.collect((FULL,), again, 1.0)["arms"][0]["further"] == found["arms"][0]["further"]


def is_a_picture(path) -> bool:
  pixels = plt.imread(path)
  return (
    path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and pixels.shape[:2] == (720, 1080) and float(pixels.std()) > 0.01
  )


def test_the_pictures_can_be_drawn_again_from_results_json(tmp_path, found):
  results.write_results(found, tmp_path, "three methods")
  loaded = json.loads((tmp_path / "results.json").read_text())
  for name, plot in (("curves", plot_curves), ("parameters", plot_parameters)):
    plot(loaded, tmp_path / "again.png", "three methods")
    assert is_a_picture(tmp_path / f"{name}.png")
    np.testing.assert_array_equal(plt.imread(tmp_path / f"{name}.png"), plt.imread(tmp_path / "again.png"))


@pytest.fixture
def drawn(monkeypatch):
  """{name of the file: (figure, axes)} of the pictures, instead of files."""
  figures = {}
  monkeypatch.setattr(results_figures, "finish", lambda figure, axes, path: figures.update({path.name: (figure, axes)}))
  yield figures
  plt.close("all")


def test_curves_are_means_with_the_band_of_all_seeds(tmp_path, found, drawn):
  plot_curves(found, tmp_path / "curves.png", "three methods")
  _, axes = drawn["curves.png"]
  assert (axes.get_xlabel(), axes.get_ylabel()) == ("training step", "validation loss (nats per token)")
  assert axes.get_title() == "three methods"
  assert axes.get_legend_handles_labels()[1] == ["full, learning rate 0.001", "switchlora, rank 4, learning rate 0.02"]
  full, switched = axes.get_lines()
  last = np.mean(perplexities(10, 12, 17))
  np.testing.assert_array_equal(full.get_xdata(), [4, 8, 12])
  np.testing.assert_allclose(full.get_ydata(), [last + 0.2, last + 0.1, last])
  np.testing.assert_allclose(switched.get_ydata()[-1], np.mean(perplexities(20, 24, 22)))
  bands = [collection.get_paths()[0].vertices for collection in axes.collections]
  assert len(bands) == 2
  assert bands[0][:, 1].min() == pytest.approx(math.log(10))
  assert bands[0][:, 1].max() == pytest.approx(math.log(17) + 0.2)


def test_parameters_are_drawn_against_perplexity(tmp_path, found, drawn):
  plot_parameters(found, tmp_path / "parameters.png", "three methods")
  _, axes = drawn["parameters.png"]
  assert (axes.get_xlabel(), axes.get_ylabel()) == ("number of trainable parameters", "validation perplexity")
  bars = {bar.get_label(): bar for bar in axes.containers}
  assert list(bars) == ["full", "switchlora, rank 4"]
  np.testing.assert_allclose(bars["full"].lines[0].get_xydata(), [[14_672, 13]])
  ((low, high),) = bars["switchlora, rank 4"].lines[2][0].get_segments()
  np.testing.assert_allclose([low[1], high[1]], [20, 24])


def test_seeds_evaluated_at_other_steps_are_drawn_where_all_were(tmp_path, found, drawn):
  curves = [[[4, 2.0], [8, 1.0], [12, None]], [[2, 9.0], [4, 4.0], [12, 1.0]]]
  trials = [found["cells"][0] | {"curve": curve, "seed": seed} for seed, curve in enumerate(curves)]
  plot_curves(found | {"arms": found["arms"][:1], "cells": trials}, tmp_path / "curves.png", "")
  (line,) = drawn["curves.png"][1].get_lines()
  np.testing.assert_array_equal(line.get_xydata(), [[4, 3.0], [12, np.nan]])


def test_a_long_title_fits_the_figure(tmp_path, found, drawn):
  title = " ".join(["every word"] * 30)
  results.write_results(found, tmp_path, title)
  for figure, axes in drawn.values():
    box = axes.title.get_window_extent(figure.canvas.get_renderer())
    assert figure.bbox.x0 < box.x0 < box.x1 < figure.bbox.x1
    assert axes.get_title().split() == title.split()
  assert len(drawn) == 2


def test_figures_without_any_result_are_empty(tmp_path, found):
  results.write_results(found | {"arms": found["arms"][2:], "cells": []}, tmp_path, "nothing")
  assert is_a_picture(tmp_path / "curves.png") and is_a_picture(tmp_path / "parameters.png")


def test_markdown():
  rows = [{"": "a", "ours": 1}, {"": "b", "ours": "±2"}]
  assert markdown(rows) == "|  | ours |\n|---|---|\n| a | 1 |\n| b | ±2 |\n"


def test_nothing_is_allocated_for_the_sizes(ran):
  before = len(jax.live_arrays())
  results.collect(ARMS, ran, 1.0)
  assert len(jax.live_arrays()) <= before


def test_lines_of_a_figure_differ_in_colour_and_neighbours_in_marker_or_line_style():
  styles = [line_style(number) for number in range(96)]
  colors = np.array([style["color"] for style in styles[:32]])
  distances = np.linalg.norm(colors[:, None] - colors, axis=-1) + np.eye(32)
  assert distances.min() > 0.1, "no two of 32 colours can be confused"
  assert len({style["marker"] for style in styles[:12]}) == 12
  assert len({(style["marker"], style["linestyle"]) for style in styles[:36]}) == 36
  assert len({tuple(style.values()) for style in styles}) == 96


def test_the_hand_over_is_marked_once_per_step_and_steps_are_integers(tmp_path, found, drawn):
  assert [row["hand_over"] for row in found["arms"]] == [None] * 3
  plot_curves(found, tmp_path / "curves.png", "")
  assert not drawn["curves.png"][1].texts
  for row in found["arms"]:
    row["hand_over"] = 5
  plot_curves(found, tmp_path / "curves.png", "")
  _, axes = drawn["curves.png"]
  assert [text.get_text() for text in axes.texts] == ["hand-over after step 5"]
  assert all(float(tick).is_integer() for tick in axes.get_xticks())


def test_an_svg_is_beside_each_png_and_equal_figures_give_equal_files(tmp_path):
  files = []
  for folder in (tmp_path / "a", tmp_path / "b"):
    folder.mkdir()
    figure, axes = plt.subplots()
    axes.plot([1, 2], [3, 4], **line_style(0))
    save_figure(figure, folder / "figure.png")
    files.append({path.name: path.read_bytes() for path in folder.iterdir()})
  assert files[0] == files[1] and {*files[0]} == {"figure.png", "figure.svg"}
  assert b"<svg" in files[0]["figure.svg"]


# --- sweeps of two rates, edges, the paired test --------------------------------------------------------------------

BOTH = Variant("full", {"method": "full"}, (1e-3, 2e-3, 4e-3), rest_learning_rates=(1e-3, 2e-3, 4e-3))
ONE = Variant("switchlora, rank 4", {"method": "switchlora"}, (1e-2, 2e-2))


@pytest.fixture
def both(tmp_path, runs):
  """Full rank over both rates, best inside, and SwitchLoRA with its best rate at the edge."""

  def surface(trial):
    if trial.config.method == "switchlora":
      return 3.2 - trial.learning_rate + 0.01 * trial.seed
    offset = math.log2(trial.learning_rate / 2e-3) ** 2 + math.log2(trial.config.rest_learning_rate / 2e-3) ** 2
    loss = 3 + 0.1 * offset + (0.02, 0.01, 0.03)[trial.seed]
    return float("nan") if trial.point == (4e-3, 4e-3) else loss

  runs.surface = surface
  return sweep.run_sweep(tiny_base(tmp_path), (BOTH, ONE), workdir=tmp_path, **OPTIONS)


def test_rows_and_table_of_both_rates(both):
  found = results.collect((BOTH, ONE), both, 1.0)
  full, switched = found["arms"]
  assert (full["learning_rate"], full["rest_learning_rate"], full["edges"]) == (2e-3, 2e-3, [False, False])
  assert len(full["sweep"]) == 9 and full["sweep"]["0.004, 0.004"] is None
  assert full["sweep"]["0.001, 0.002"] == pytest.approx(math.exp(3.12))
  assert full["seeds"] == 3 and not full["at_edge_of_sweep"] and switched["edges"] == [True, False]
  lines = results_table(found).splitlines()
  assert lines[0].startswith("|  | validation perplexity | learning rate | of embedding, norms, head | rates tried |")
  assert "| 0.002 | 0.002 | 9 |" in lines[2] and "| 0.02† |  | 2 |" in lines[3]


def test_an_edge_is_refused_after_all_files_are_written(tmp_path, both):
  options = OPTIONS | {"workdir": tmp_path, "reference": "full"}
  results.conclude((BOTH, ONE), both, options, "edges are allowed by default")
  (tmp_path / "table.md").unlink()
  with pytest.raises(UserError) as caught:
    results.conclude((BOTH, ONE), both, options | {"allow_edges": False}, "title")
  assert str(caught.value) == (
    "the best learning rate is at the edge of its sweep for switchlora, rank 4, so these rows cannot be compared; "
    "raise --extend or give further rates, and the same command continues; or pass --allow_edges"
  )
  assert "0.02†" in (tmp_path / "table.md").read_text() and (tmp_path / "rates.png").exists()
  results.conclude((BOTH,), [r for r in both if r.trial.variant is BOTH], options | {"allow_edges": False}, "inside")


def test_a_neighbour_that_failed_has_not_run(both):
  failed = [r._replace(failure="failed") if r.trial.point == (4e-3, 2e-3) else r for r in both]
  assert results.collect((BOTH,), failed[:9], 1.0)["arms"][0]["edges"] == [True, False]


def test_differences_to_the_reference_are_those_of_paired_seeds(both):
  found = results.collect((BOTH, ONE), both, 1.0, reference="full")
  ours = found["arms"][1]["difference"]
  full, switched = [3.02, 3.01, 3.03], [3.18, 3.19, 3.2]
  assert found["arms"][0]["difference"] is None and ours["seeds"] == 3
  assert ours["p"] == pytest.approx(stats.ttest_rel(switched, full).pvalue)
  assert ours["mean"] == pytest.approx(np.mean(switched) - np.mean(full))
  refused, allowed = (results_table(found | {"allow_edges": allow}) for allow in (False, True))
  assert "difference" not in refused and f"| {ours['mean']:+.4f} ± {ours['standard_error']:.4f} |" in allowed
  assert f"| {ours['p']:.3f} |" in allowed and "minus that of full, in nats per token" in allowed


def test_runs_on_other_data_or_of_one_seed_are_not_compared(tmp_path, runs, both):
  one = [r for r in both if r.trial.seed == 0]
  assert [row["difference"] for row in results.collect((BOTH, ONE), one, 1.0, reference="full")["arms"]] == [None] * 2
  runs.text = fake_text("def")
  other = sweep.run_sweep(tiny_base(tmp_path), (ONE,), workdir=tmp_path / "other", **OPTIONS)
  mixed = [r for r in both if r.trial.variant is BOTH] + other
  assert results.collect((BOTH, ONE), mixed, 1.0, reference="full")["arms"][1]["difference"] is None


def test_times_and_memory_of_a_run(tmp_path):
  trial = make_trial(tiny_base(tmp_path), FULL, None, 0)
  write_run(tmp_path / "run", trial.config, {12: 3.0})
  tokens = trial.config.batch_size * trial.config.seq_len
  speeds = (tokens / 10, tokens / 2, tokens / 2)
  rows = [
    {"step": step, "loss": 3.0, "tokens_per_second": speed, "peak_memory_bytes": 2**21 + step}
    for step, speed in enumerate(speeds, 1)
  ]
  with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
    file.writelines(json.dumps(row) + "\n" for row in rows)
  found = results.collect((FULL,), [TrialResult(trial, tmp_path / "run", None)], 1.0)
  row = found["arms"][0]
  assert (row["seconds"], row["step_seconds"], row["tokens_per_second"]) == (14, 2, tokens / 2)
  assert row["peak_memory_bytes"] == 2**21 + 3
  text = results_table(found)
  assert "| training time, s | step, ms | tokens / s | peak memory, MiB |" in text
  assert f"| 14 | 2,000 | {tokens // 2:,} | 2 |" in text and "training time: of one run" in text
  assert "different devices" not in text
  found["arms"].append(row | {"devices": ["8 × GPU"]})
  assert re.search(r"different devices: .*8 × GPU", results_table(found))


def steps_logged(workdir, rows):
  with (workdir / "metrics.jsonl").open("a") as file:
    file.writelines(json.dumps({"step": step, "loss": 3.0} | row) + "\n" for step, row in enumerate(rows, 1))


def test_a_seed_that_failed_after_some_steps_has_no_times(tmp_path):
  base, results_of = tiny_base(tmp_path), []
  for seed, failure in ((0, None), (1, "failed with exit code 2")):
    trial, workdir = make_trial(base, FULL, None, seed), tmp_path / f"run{seed}"
    write_run(workdir, trial.config, {12: 3.0})
    tokens = trial.config.batch_size * trial.config.seq_len
    steps_logged(workdir, [{"tokens_per_second": tokens / (1 + 9 * seed)}] * 2)
    results_of.append(TrialResult(trial, workdir, failure))
  row = results.collect((FULL,), results_of, 1.0)["arms"][0]
  assert (row["seconds"], row["step_seconds"], len(row["devices"])) == (2, 1, 1)


def test_padding_is_neither_in_the_tokens_nor_in_the_time_of_a_step(tmp_path):
  trial = make_trial(tiny_base(tmp_path, data__packing="pad"), FULL, None, 0)
  write_run(tmp_path / "run", trial.config, {12: 3.0})
  steps_logged(tmp_path / "run", [{"tokens": 30, "tokens_per_second": 10.0}, {"tokens": 50, "tokens_per_second": 10.0}])
  row = results.collect((FULL,), [TrialResult(trial, tmp_path / "run", None)], 1.0)["arms"][0]
  assert (row["tokens"], row["seconds"], row["step_seconds"]) == (80, 8, 4)


def test_all_is_drawn_again_from_results_json_alone(tmp_path, both, capsys):
  options = OPTIONS | {"workdir": tmp_path, "reference": "full"}
  results.conclude((BOTH, ONE), both, options, "two methods")
  printed, again = capsys.readouterr().out, tmp_path / "again"
  again.mkdir()
  shutil.copy(tmp_path / "results.json", again)
  results.redraw(again)
  assert capsys.readouterr().out == printed.replace(str(tmp_path), str(again))
  names = ("table.md", "curves.svg", "parameters.svg", "rates.svg")
  assert all((again / name).read_bytes() == (tmp_path / name).read_bytes() for name in names)
  with pytest.raises(UserError, match=r"must hold the results\.json of a sweep"):
    results.redraw(tmp_path / "cells")


def test_a_killed_sweep_has_results_that_can_be_drawn(tmp_path, both):
  record = results.recorder((BOTH, ONE), OPTIONS | {"workdir": tmp_path / "killed"}, "two methods")
  (tmp_path / "killed").mkdir()
  record(both[:4])
  results.redraw(tmp_path / "killed")
  assert "| full | " in (tmp_path / "killed" / "table.md").read_text()
  assert len(json.loads((tmp_path / "killed" / "results.json").read_text())["arms"]) == 1


def test_rates_are_drawn_where_both_were_swept(tmp_path, both, monkeypatch):
  figures = []
  monkeypatch.setattr(results_figures, "save_figure", lambda figure, path: figures.append(figure))
  found = results.collect((BOTH, ONE), both, 1.0)
  assert [row["label"] for row in swept_rows(found)] == ["full"]
  plot_rates(found, tmp_path / "rates.png", "two methods")
  (axes,) = [axes for axes in figures[0].axes if axes.get_title()]
  assert axes.get_title() == "full" and [t.get_text() for t in axes.get_xticklabels()] == ["0.001", "0.002", "0.004"]
  shown = {text.get_position(): text.get_text() for text in axes.texts}
  assert shown[2, 2] == "diverged" and shown[1, 1] == f"{math.exp(3.02):.4g}" and len(shown) == 9
  (frame,) = axes.patches
  assert frame.get_xy() == (0.5, 0.5)
  plt.close("all")
