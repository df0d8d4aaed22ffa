"""The table of a sweep in Markdown, from the contents of results.json."""

from experiments.common.paired import LEAST_SEEDS

EDGE = "\n† best learning rate at the edge of the sweep; a wider sweep may find a better one\n"
TESTED = f"""
difference: mean over seeds of the validation loss minus that of {{reference}}, in nats per token, ± its standard error.
The difference is the logarithm of the ratio of the perplexities. p: two-sided paired t-test over the seeds, which share
the order of the data; not corrected for the number of rows. The first seed also selected the learning rates. Rows with
fewer than {LEAST_SEEDS} common seeds, with a diverged seed or at the edge of their sweep are not compared.
"""
GRADIENTS = "\ngradients: bytes that a data-parallel step all-reduces; each of n devices sends 2(n - 1)/n of them\n"
TIMES = """
training time: of one run, with compilation, without evaluations and checkpoints; step: its median. Other processes on
the machine, such as concurrent runs, are included in both.
"""

COLUMNS = {
  "": lambda row: row["label"],
  "validation perplexity": lambda row: format_perplexity(row),
  "further perplexities": lambda row: format_further(row),
  "learning rate": lambda row: format_learning_rate(row, 0),
  "of embedding, norms, head": lambda row: format_learning_rate(row, 1),
  "rates tried": lambda row: str(len(row["sweep"])) if len(row["sweep"]) > 1 else "",
  "difference": lambda row: format_difference(row),
  "p": lambda row: format_p(row),
  "tokens": lambda row: format_count(row.get("tokens")),
  "training time, s": lambda row: format_significant(row.get("seconds")),
  "step, ms": lambda row: format_significant(row.get("step_seconds"), 1000),
  "tokens / s": lambda row: format_count(row.get("tokens_per_second")),
  "peak memory, MiB": lambda row: format_count(row.get("peak_memory_bytes"), 2**-20),
  "trainable parameters": lambda row: f"{row['trainable_parameters']:,}",
  "optimizer, MiB": lambda row: f"{row['optimizer_bytes'] / 2**20:,.2f}",
  "all state, MiB": lambda row: f"{row['state_bytes'] / 2**20:,.2f}",
  "gradients, MiB": lambda row: f"{row['gradient_bytes'] / 2**20:,.2f}" if "gradient_bytes" in row else "",
  "step time / full rank": lambda row: format_number(row["step_time"]),
  "candidates cycled": lambda row: format_number(row["candidates_cycled"]),
  "paper": lambda row: format_number(row["paper"]),
}


def results_table(results: dict) -> str:
  """The rows as a Markdown table without empty columns, followed by notes and warnings."""
  rows = [refuse_comparison(row, results) for row in results["arms"]]
  filled = {name: show for name, show in COLUMNS.items() if any(show(row) for row in rows)}
  text = markdown([{name: show(row) for name, show in filled.items()} for row in rows])
  if any(row["at_edge_of_sweep"] for row in rows):
    text += EDGE
  if "difference" in filled:
    text += TESTED.format(reference=results["reference"])
  if "gradients, MiB" in filled:
    text += GRADIENTS
  if "training time, s" in filled:
    text += TIMES
  if len(devices := {name for row in rows for name in row.get("devices", ())}) > 1:
    text += f"\ntimes are of runs on different devices: {', '.join(sorted(devices))}\n"
  warned = [f"{row['label']}: {warning}" for row in rows for warning in row["warnings"]]
  return text + "".join(f"\n{line}\n" for line in warned)


def refuse_comparison(row: dict, results: dict) -> dict:
  """The row without its difference to the reference if one of both is at the edge of its sweep, unless allowed."""
  edges = {row["label"] for row in results["arms"] if row["at_edge_of_sweep"]}
  refused = {row["label"], results.get("reference")} & edges and not results.get("allow_edges")
  return row | {"difference": None} if refused else row


def markdown(rows) -> str:
  """Dictionaries with the same keys as a Markdown table."""
  lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
  return "\n".join(lines + ["| " + " | ".join(map(str, row.values())) + " |" for row in rows]) + "\n"


def format_perplexity(row: dict) -> str:
  """`38.01 ± 0.12 (3 seeds)`: mean, standard deviation, number of seeds; `(2 of 3 seeds)` if some diverged."""
  if row["mean"] is None:
    return "failed"
  good, seeds = len(row["perplexities"]), row["seeds"]
  spread = f" ± {row['std']:.2f}" if row["std"] is not None else ""
  among = f" ({good} of {seeds} seeds)" if good < seeds else f" ({seeds} seeds)" if seeds > 1 else ""
  return f"{row['mean']:.2f}{spread}{among}"


def format_further(row: dict) -> str:
  """`old 41.30 ± 0.15, code 12.01 (1 of 3 seeds)`: the texts of `data.eval_also`; empty if there are none."""
  spread = lambda found: f" ± {found['std']:.2f}" if found["std"] is not None else ""
  among = lambda found: f" ({found['seeds']} of {row['seeds']} seeds)" if found["seeds"] < row["seeds"] else ""
  further = row.get("further", {}).items()
  return ", ".join(f"{label} {found['mean']:.2f}{spread(found)}{among(found)}" for label, found in further)


def format_learning_rate(row: dict, dimension: int) -> str:
  """`0.02`, with a dagger at the edge of the sweep; dimension 1 is the rate of embedding, norms and head."""
  rate = (row["learning_rate"], row.get("rest_learning_rate"))[dimension]
  edge = row.get("edges", [row["at_edge_of_sweep"], False])[dimension]
  return f"{rate:g}{'†' * edge}" if rate else ""


def format_difference(row: dict) -> str:
  """`+0.0123 ± 0.0040`; empty if the row is not compared, see `TESTED`."""
  found = row.get("difference")
  return f"{found['mean']:+.4f} ± {found['standard_error']:.4f}" if found else ""


def format_p(row: dict) -> str:
  """`0.034`, or `< 0.001`; empty if the row is not compared."""
  p = (row.get("difference") or {}).get("p")
  return "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def format_count(value: float | None, factor: float = 1) -> str:
  """An integer with separators of thousands; empty for None."""
  return "" if value is None else f"{value * factor:,.0f}"


def format_significant(value: float | None, factor: float = 1) -> str:
  """Three significant digits, without exponent; empty for None."""
  return "" if value is None else f"{float(f'{value * factor:.3g}'):,g}"


def format_number(value: float | None) -> str:
  """Two decimals; empty for None."""
  return "" if value is None else f"{value:.2f}"
