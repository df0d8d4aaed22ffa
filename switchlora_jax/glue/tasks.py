"""GLUE: its tasks, their rows from TSV files or from the hub, and their metrics."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from switchlora_jax.data.order import shuffled
from switchlora_jax.errors import UserError

HUB = "hub"
DATASET = "nyu-mll/glue"  # of the hub
SPLITS = {"train": "train", "dev": "validation"}  # here and on the hub


class Task(NamedTuple):
  """One task of GLUE.

  Attributes:
    title: its name in tables. folder: of its files. subset: of the hub's copy.
    sentences: the columns of its text in the files; label: that of the answer.
    classes: the labels in the order of their numbers; none: the answer is a number between 0 and 5.
    rows: of each split.
    header: the columns, where the files do not name them in their first line.
    matthews: whether it is judged by Matthews' correlation instead of accuracy; numbers by Pearson's.
  """

  title: str
  folder: str
  subset: str
  sentences: tuple[str, ...]
  label: str
  classes: tuple[str, ...]
  rows: dict[str, int]
  header: tuple[str, ...] = ()
  matthews: bool = False

  @property
  def outputs(self) -> int:
    """Numbers that a model says of a row: one a class, or the answer itself."""
    return len(self.classes) or 1

  @property
  def metric(self) -> str:
    """The name of what `score` computes."""
    return "Matthews correlation" if self.matthews else "accuracy" if self.classes else "Pearson correlation"


BOTH = ("sentence1", "sentence2")
TASKS = {
  "cola": Task(
    *("CoLA", "CoLA", "cola", ("sentence",), "label", ("0", "1"), {"train": 8551, "dev": 1043}),
    header=("source", "label", "mark", "sentence"),
    matthews=True,
  ),
  "stsb": Task("STS-B", "STS-B", "stsb", BOTH, "score", (), {"train": 5749, "dev": 1500}),
  "mrpc": Task(
    *("MRPC", "MRPC", "mrpc", ("#1 String", "#2 String"), "Quality", ("0", "1"), {"train": 3668, "dev": 408})
  ),
  "rte": Task("RTE", "RTE", "rte", BOTH, "label", ("entailment", "not_entailment"), {"train": 2490, "dev": 277}),
  "sst2": Task("SST2", "SST-2", "sst2", ("sentence",), "label", ("0", "1"), {"train": 67349, "dev": 872}),
}


def task_named(name: str) -> Task:
  """The task of a name.

  Raises:
    UserError: there is none; lists them.
  """
  if name not in TASKS:
    raise UserError(f"the task (={name!r}) must be one of {', '.join(TASKS)}")
  return TASKS[name]


# Where rows come from.


class Rows(NamedTuple):
  """A split of a task: the one or two sentences of each row, and the labels, [rows] int32 classes or float32."""

  texts: list[tuple[str, ...]]
  labels: np.ndarray


def read(task: Task, data: str) -> dict[str, Rows]:
  """The rows of `train` and `dev`, from the folder `data` that holds `TASK/{train,dev}.tsv[.gz]`, or from the `hub`.

  Raises:
    UserError: what is there is not this task's, by its columns, labels or number of rows, or cannot be read.
  """
  found = {split: (_hub if data == HUB else _file)(task, data, split) for split in SPLITS}
  for split, rows in found.items():
    if len(rows.texts) != task.rows[split]:
      raise UserError(
        f"{task.title}, {split}, must have {task.rows[split]:,} rows; found {len(rows.texts):,} in {data}; "
        "restore the file (its quotes are part of the text: it must not be parsed as CSV)"
      )
  return found


def _file(task: Task, data: str, split: str) -> Rows:
  """The rows of a TSV file. Nothing is quoted in it: a tab always ends a column, a newline a row."""
  names = [Path(data).expanduser() / task.folder / f"{split}.tsv{ending}" for ending in ("", ".gz")]
  path = next((name for name in names if name.is_file()), None)
  if path is None:
    raise UserError(f"--data={data} must hold {task.folder}/{split}.tsv or .tsv.gz; found neither; or use --data=hub")
  lines = enumerate(_lines(path), 1)
  header = task.header or tuple(next(lines, (0, []))[1])
  if absent := [name for name in (*task.sentences, task.label) if name not in header]:
    raise UserError(
      f"{path} must have the columns {', '.join((*task.sentences, task.label))}; its first line lacks "
      f"{', '.join(absent)} and has {', '.join(header) or 'nothing'}; is it {task.title}'s?"
    )
  texts, labels = [], []
  for number, fields in lines:
    if len(fields) != len(header):
      raise UserError(
        f"{path}, line {number}, must have {len(header)} columns ({', '.join(header)}); found {len(fields)}; "
        f"is it {task.title}'s, and complete?"
      )
    row = dict(zip(header, fields, strict=True))
    texts.append(tuple(row[name].strip() for name in task.sentences))
    labels.append(_label(task, row[task.label], f"{path}, line {number}"))
  return Rows(texts, np.array(labels, np.int32 if task.classes else np.float32))


def _lines(path: Path) -> Iterator[list[str]]:
  """The fields of each line; only a newline ends one, not the other breaks that Unicode knows."""
  try:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="\n") as file:
      for line in file:
        yield line.rstrip("\r\n").split("\t")
  except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
    raise UserError(
      f"{path} must be UTF-8 text, gzipped if it ends in .gz; reading it failed with {type(error).__name__}: {error}; "
      "restore the file"
    ) from error


def _label(task: Task, text: str, where: str) -> int | float:
  """The number of a class, or a score."""
  if task.classes:
    if text in task.classes:
      return task.classes.index(text)
    raise UserError(f"{where}: the label must be one of {', '.join(task.classes)}; found {text!r:.60}")
  try:
    if 0 <= (value := float(text)) <= 5:
      return value
  except ValueError:
    pass
  raise UserError(f"{where}: the score must be a number between 0 and 5; found {text!r:.60}")


def _hub(task: Task, data: str, split: str) -> Rows:
  """The rows of the hub's copy, whose labels are numbers already."""
  import datasets  # here, because it takes a second and only the hub wants it

  columns = ("sentence",) if len(task.sentences) == 1 else BOTH
  try:
    table = datasets.load_dataset(DATASET, task.subset, split=SPLITS[split])
    texts = zip(*(table[name] for name in columns), strict=True)
    labels = np.array(table["label"], np.int32 if task.classes else np.float32)
  except (OSError, ValueError, RuntimeError, KeyError) as error:
    raise UserError(
      f"{DATASET}, {task.subset}, could not be read from the {data}: {type(error).__name__}: "
      f"{' '.join(str(error).split())[:300]}; it wants a network; of a local copy, give the folder: --data=glue"
    ) from error
  return Rows([tuple(text.strip() for text in row) for row in texts], labels)


def part_of(rows: Rows, count: int | None) -> Rows:
  """So many of the rows, drawn once and for all: files are sorted by where the text comes from. None: all."""
  if count is None or count >= len(rows.texts):
    return rows
  picks = shuffled(np.arange(count), len(rows.texts), seed=0, epoch=0)
  return Rows([rows.texts[pick] for pick in picks], rows.labels[picks])


# What the answers are worth.


def answers(task: Task, outputs: np.ndarray) -> np.ndarray:
  """What a model's outputs [rows, outputs] say, as labels are given: [rows] classes or numbers."""
  return outputs.argmax(-1) if task.classes else outputs[:, 0]


def score(task: Task, answered: np.ndarray, labels: np.ndarray) -> float:
  """The task's metric, of a perfect model 1; a correlation is 0 where one answer is given to all."""
  if task.classes and not task.matthews:
    return float(np.mean(answered == labels))
  if not np.ptp(answered) or not np.ptp(labels):
    return 0.0
  # Of two classes, Matthews' correlation is Pearson's.
  return float(stats.pearsonr(answered.astype(float), labels.astype(float)).statistic)


def best_constant(task: Task, labels: np.ndarray) -> float:
  """What one and the same answer to all would score: the share of the most frequent class, or no correlation."""
  constant = np.bincount(labels).argmax() if task.classes else 0.0
  return score(task, np.full(len(labels), constant), labels)
