"""GLUE: tasks, their data from TSV files or from the Hugging Face hub, and their metrics."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from switchlora_jax.data.loader import shuffled_indices
from switchlora_jax.errors import UserError

HUB = "hub"
DATASET = "nyu-mll/glue"  # on the hub
SPLITS = {"train": "train", "dev": "validation"}  # name here: name on the hub


class Task(NamedTuple):
  """A task of GLUE.

  Attributes:
    title: name in tables.
    folder: folder of its TSV files.
    subset: name of the hub's subset.
    sentences: columns of the one or two sentences in the TSV files.
    label: column of the label.
    classes: labels in the order of their class indices; empty for regression, with scores between 0 and 5.
    rows: number of rows per split.
    header: column names of TSV files without a header line; empty if the first line is the header.
    matthews: whether the metric is Matthews' correlation instead of accuracy. That of regression is Pearson's.
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
    """Number of model outputs per example: one per class, or one for regression."""
    return len(self.classes) or 1

  @property
  def metric(self) -> str:
    """Name of the metric that `score_predictions` computes."""
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
  """Looks up a task.

  Raises:
    UserError: there is no such task. The message lists all tasks.
  """
  if name not in TASKS:
    raise UserError(f"the task (={name!r}) must be one of {', '.join(TASKS)}")
  return TASKS[name]


# Data.


class LabelledTexts(NamedTuple):
  """A split of a task.

  Attributes:
    sentences: the one or two sentences of each row.
    labels: [rows], int32 class indices, or float32 scores for regression.
  """

  sentences: list[tuple[str, ...]]
  labels: np.ndarray


def read_task(task: Task, data: str) -> dict[str, LabelledTexts]:
  """Reads the splits `train` and `dev` of a task.

  Args:
    task: the task.
    data: a folder with `TASK/train.tsv` and `TASK/dev.tsv`, optionally as `.tsv.gz`; or `hub`.

  Raises:
    UserError: a file cannot be read, or its columns, labels or number of rows are not those of the task.
  """
  splits = {split: (_read_hub if data == HUB else _read_file)(task, data, split) for split in SPLITS}
  for split, texts in splits.items():
    if (count := len(texts.sentences)) != task.rows[split]:
      raise UserError(
        f"{task.title}, {split}, must have {task.rows[split]:,} rows; found {count:,} in {data}; "
        "restore the file (quotes are part of the text: it must not be parsed as CSV)"
      )
  return splits


def _read_file(task: Task, data: str, split: str) -> LabelledTexts:
  """Reads a TSV file. GLUE's files have no quoting: every tab ends a column and every newline a row."""
  names = [Path(data).expanduser() / task.folder / f"{split}.tsv{ending}" for ending in ("", ".gz")]
  path = next((name for name in names if name.is_file()), None)
  if path is None:
    raise UserError(f"--data={data} must hold {task.folder}/{split}.tsv or .tsv.gz; found neither; or use --data=hub")
  lines = enumerate(_lines(path), 1)
  header = task.header or tuple(next(lines, (0, []))[1])
  if missing := [name for name in (*task.sentences, task.label) if name not in header]:
    raise UserError(
      f"{path} must have the columns {', '.join((*task.sentences, task.label))}; its first line lacks "
      f"{', '.join(missing)} and has {', '.join(header) or 'nothing'}; check that it is a file of {task.title}"
    )
  sentences, labels = [], []
  for number, fields in lines:
    if len(fields) != len(header):
      raise UserError(
        f"{path}, line {number}, must have {len(header)} columns ({', '.join(header)}); found {len(fields)}; "
        f"check that it is a complete file of {task.title}"
      )
    row = dict(zip(header, fields, strict=True))
    sentences.append(tuple(row[name].strip() for name in task.sentences))
    labels.append(_parse_label(task, row[task.label], f"{path}, line {number}"))
  return LabelledTexts(sentences, np.array(labels, np.int32 if task.classes else np.float32))


def _lines(path: Path) -> Iterator[list[str]]:
  """The fields of each line. Only a newline ends a line, not the other line separators of Unicode."""
  try:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="\n") as file:
      for line in file:
        yield line.rstrip("\r\n").split("\t")
  except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
    raise UserError(
      f"{path} must be UTF-8 text, gzipped if it ends in .gz; reading it failed with {type(error).__name__}: {error}; "
      "restore the file"
    ) from error


def _parse_label(task: Task, text: str, where: str) -> int | float:
  """The index of a class, or a score. `where` is the file and line, for error messages."""
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


def _read_hub(task: Task, data: str, split: str) -> LabelledTexts:
  """Reads a split of the hub's dataset, whose labels are numbers."""
  import datasets  # local import: it takes a second, and files do not need it

  columns = ("sentence",) if len(task.sentences) == 1 else BOTH
  try:
    table = datasets.load_dataset(DATASET, task.subset, split=SPLITS[split])
    texts = zip(*(table[name] for name in columns), strict=True)
    labels = np.array(table["label"], np.int32 if task.classes else np.float32)
  except (OSError, ValueError, RuntimeError, KeyError) as error:
    raise UserError(
      f"{DATASET}, {task.subset}, could not be read from the {data}: {type(error).__name__}: "
      f"{' '.join(str(error).split())[:300]}; it needs network access; for a local copy, pass its folder: --data=glue"
    ) from error
  return LabelledTexts([tuple(text.strip() for text in row) for row in texts], labels)


def random_subset(texts: LabelledTexts, count: int | None) -> LabelledTexts:
  """`count` random rows, always the same ones; None: all. Random because the files are sorted by the texts' source."""
  total = len(texts.sentences)
  if count is None or count >= total:
    return texts
  indices = shuffled_indices(np.arange(count), total, seed=0, epoch=0)
  return LabelledTexts([texts.sentences[index] for index in indices], texts.labels[indices])


# Metrics.


def predictions_of(task: Task, outputs: np.ndarray) -> np.ndarray:
  """Class indices or scores, [rows], from the outputs of a model, [rows, outputs]."""
  return outputs.argmax(-1) if task.classes else outputs[:, 0]


def score_predictions(task: Task, predictions: np.ndarray, labels: np.ndarray) -> float:
  """The task's metric, 1 for perfect predictions. The correlation of constant predictions is defined as 0."""
  if task.classes and not task.matthews:
    return float(np.mean(predictions == labels))
  if not np.ptp(predictions) or not np.ptp(labels):
    return 0.0
  # For two classes, Matthews' correlation equals Pearson's.
  return float(stats.pearsonr(predictions.astype(float), labels.astype(float)).statistic)


def majority_baseline(task: Task, labels: np.ndarray) -> float:
  """The score of predicting the most frequent class for every row, or a constant for regression."""
  constant = np.bincount(labels).argmax() if task.classes else 0.0
  return score_predictions(task, np.full(len(labels), constant), labels)
