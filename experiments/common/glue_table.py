"""Results of `experiments.finetune_glue` as Markdown tables, beside Tables 6 and 7 of the paper."""

from experiments.common.results_table import EDGE, markdown
from experiments.paper.items import ITEMS


def glue_tables(rows: list[dict]) -> str:
  """Tables with one line per model and one column per task, in percent as in the paper; then the paper's tables.

  Args:
    rows: as in results.json, one per model and task.
  """
  titles = list(dict.fromkeys(row["task"] for row in rows))
  text = "Mean ± standard deviation over seeds, in percent, on the dev rows at the best epoch:\n\n"
  text += markdown(table_rows(rows, titles, "best_epoch"))
  text += "\nAfter the last epoch:\n\n" + markdown(table_rows(rows, titles, "last_epoch"))
  text += EDGE * any(row["at_edge_of_sweep"] for row in rows)
  papers = [
    {"": f"{row['']}, {size}"} | {title: row[title] for title in titles}
    for size, item in (("350M", "table6"), ("1.3B", "table7"))
    for row in ITEMS[item].paper
  ]
  return text + "\nThe paper's (Tables 6 and 7):\n\n" + markdown(papers)


def table_rows(rows: list[dict], titles: list[str], epoch: str) -> list[dict]:
  """One table row per model, and one for the majority-class baseline. `epoch` is `best_epoch` or `last_epoch`."""
  names = list(dict.fromkeys(row["model"] for row in rows))
  scores = {(row["model"], row["task"]): percent(row[epoch]) + "†" * row["at_edge_of_sweep"] for row in rows}
  by_model = [{"": name} | {title: scores.get((name, title), "") for title in titles} for name in names]
  baseline = {row["task"]: f"{100 * row['constant']:.2f}" for row in rows}
  return [*by_model, {"": "majority-class baseline"} | baseline]


def percent(result: dict) -> str:
  """`42.95 ± 5.00`, followed by `(2 of 3 seeds)` if the others diverged. `result` is as from `mean_and_std`."""
  finite = sum(score is not None for score in result["scores"])
  seeds = f" ({finite} of {len(result['scores'])} seeds)" if finite < len(result["scores"]) else ""
  if not finite:
    return f"diverged{seeds}"
  return f"{100 * result['mean']:.2f}" + (f" ± {100 * result['std']:.2f}" if finite > 1 else "") + seeds
