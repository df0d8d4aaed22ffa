from experiments.common.glue_table import glue_tables


def found(*scores):
  good = [score for score in scores if score is not None]
  return {"scores": list(scores), "mean": sum(good) / len(good) if good else None, "std": 0.05 if good[1:] else None}


def row(model, task, best, last, at_edge=False, constant=0.5):
  spreads = {"best_epoch": best, "last_epoch": last}
  return {"model": model, "task": task, "at_edge_of_sweep": at_edge, "constant": constant} | spreads


def test_a_line_a_model_and_a_column_a_task():
  text = glue_tables(
    [
      row("ours", "RTE", found(0.6, 0.7), found(0.5, 0.6)),
      row("ours", "CoLA", found(0.2, None, 0.3), found(0.1, None, 0.1), constant=0.0),
      row("theirs", "RTE", found(0.55), found(0.55)),
    ]
  )
  best, last, papers = text.split("\n\nAfter the last epoch:\n\n")[0], *text.split("\n\n")[3::2]
  assert best.splitlines()[2:] == [
    "|  | RTE | CoLA |",
    "|---|---|---|",
    "| ours | 65.00 ± 5.00 | 25.00 ± 5.00 (2 of 3 seeds) |",
    "| theirs | 55.00 |  |",
    "| majority-class baseline | 50.00 | 0.00 |",
  ]
  assert "| ours | 55.00 ± 5.00 | 10.00 ± 5.00 (2 of 3 seeds) |" in last
  assert "| SwitchLoRA, 350M | 56.24±5 | 23.13±15 |" in papers and "†" not in text


def test_what_was_found_at_the_edge_of_a_sweep_is_marked():
  inside, edge = row("a", "RTE", found(0.6), found(0.6)), row("b", "RTE", found(0.7), found(0.7), at_edge=True)
  text = glue_tables([inside, edge])
  assert text.count("| a | 60.00 |") == text.count("| b | 70.00† |") == 2
  assert "† best learning rate at the edge of the sweep" in text


def test_what_diverged_with_all_seeds_has_no_mean():
  assert "| a | diverged (0 of 2 seeds) |" in glue_tables([row("a", "RTE", found(None, None), found(None, None))])
