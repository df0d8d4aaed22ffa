"""GLUE files with made-up rows and the columns of the real files. One word of a row determines its label."""

import gzip
from pathlib import Path

import numpy as np

from switchlora_jax.glue.tasks import TASKS, Task

COLUMNS = {  # the first lines of the real files
  "cola": "source label mark sentence",
  "stsb": "index genre filename year old_index source1 source2 sentence1 sentence2 score",
  "mrpc": "Quality|#1 ID|#2 ID|#1 String|#2 String",
  "rte": "index sentence1 sentence2 label",
  "sst2": "sentence label",
}


def columns(name: str) -> list[str]:
  """The columns of a task's files."""
  return COLUMNS[name].split("|" if "|" in COLUMNS[name] else " ")


def made_up_rows(name: str, count: int, seed: int) -> list[dict[str, str]]:
  """Rows whose label is determined by the word `good` or `poor` in their last sentence."""
  task, random = TASKS[name], np.random.default_rng(seed)
  marks = dict(zip(("good", "poor"), task.classes, strict=True)) if task.classes else {"good": "5.000", "poor": "0.250"}
  rows = []
  for number in range(count):
    mark = random.choice(list(marks))
    words = [str(word) for word in random.choice(["red", "house", "walks", "the", "tree"], random.integers(1, 6))]
    words.insert(random.integers(len(words) + 1), mark)
    row = dict.fromkeys(columns(name), str(number))
    row |= {column: "a plain sentence" for column in task.sentences[:-1]}
    rows.append(row | {task.sentences[-1]: " ".join(words), task.label: marks[mark]})
  return rows


def write_rows(path: Path, name: str, rows: list[dict[str, str]]):
  """Writes rows as a TSV file, gzipped if its suffix is .gz."""
  lines = ["\t".join(row[column] for column in columns(name)) for row in rows]
  head = [] if TASKS[name].header else ["\t".join(columns(name))]
  path.parent.mkdir(parents=True, exist_ok=True)
  with gzip.open(path, "wb") if path.suffix == ".gz" else path.open("wb") as file:
    file.write("\n".join([*head, *lines, ""]).encode())


def write_task(folder: Path, name: str, task: Task | None = None):
  """Writes both files of a task, with as many rows as `task` requires (default: as many as the real files)."""
  task = task or TASKS[name]
  write_rows(folder / task.folder / "train.tsv.gz", name, made_up_rows(name, task.rows["train"], 0))
  write_rows(folder / task.folder / "dev.tsv", name, made_up_rows(name, task.rows["dev"], 1))
