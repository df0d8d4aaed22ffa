"""What `experiments.finetune_glue` has found, as Markdown beside Tables 6 and 7 of the paper."""

from experiments.common.results import EDGE, markdown
from experiments.paper.items import ITEMS


def tables(rows: list[dict]) -> str:
  """A line a model and a column a task, in per cent, as the paper has it; then the paper's. Rows as in results.json."""
  titles = list(dict.fromkeys(row["task"] for row in rows))
  text = "Mean ± standard deviation over seeds, in per cent, of the dev rows at the best epoch:\n\n"
  text += markdown(lines(rows, titles, "best_epoch"))
  text += "\nAfter the last epoch:\n\n" + markdown(lines(rows, titles, "last_epoch"))
  text += EDGE * any(row["at_edge_of_sweep"] for row in rows)
  papers = [
    {"": f"{row['']}, {size}"} | {title: row[title] for title in titles}
    for size, item in (("350M", "table6"), ("1.3B", "table7"))
    for row in ITEMS[item].paper
  ]
  return text + "\nThe paper's (Tables 6 and 7):\n\n" + markdown(papers)


def lines(rows: list[dict], titles: list[str], when: str) -> list[dict]:
  """A row of Markdown for each model, and one for answers that are always the same."""
  names = list(dict.fromkeys(row["model"] for row in rows))
  cells = {(row["model"], row["task"]): percent(row[when]) + "†" * row["at_edge_of_sweep"] for row in rows}
  shown = [{"": name} | {title: cells.get((name, title), "") for title in titles} for name in names]
  constant = {row["task"]: f"{100 * row['constant']:.2f}" for row in rows}
  return [*shown, {"": "the same answer to all"} | constant]


def percent(found: dict) -> str:
  """`42.95 ± 5.00`, and `(2 of 3 seeds)` where the others diverged."""
  good = sum(score is not None for score in found["scores"])
  among = f" ({good} of {len(found['scores'])} seeds)" if good < len(found["scores"]) else ""
  if not good:
    return f"diverged{among}"
  return f"{100 * found['mean']:.2f}" + (f" ± {100 * found['std']:.2f}" if good > 1 else "") + among
