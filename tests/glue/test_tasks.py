from pathlib import Path

import glue_files
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paths import SHARED

from switchlora_jax.errors import UserError
from switchlora_jax.glue import tasks as glue
from switchlora_jax.glue.tasks import TASKS, majority_baseline, predictions_of, score_predictions

REAL = SHARED / "glue"
SMALL = {name: task._replace(rows={"train": 6, "dev": 3}) for name, task in TASKS.items()}


@pytest.mark.parametrize("name", TASKS)
def test_the_files_of_a_task_are_read(tmp_path, name):
  glue_files.write_task(tmp_path, name, SMALL[name])
  found = glue.read_task(SMALL[name], str(tmp_path))
  for split, seed in (("train", 0), ("dev", 1)):
    rows = glue_files.made_up_rows(name, SMALL[name].rows[split], seed)
    assert found[split].sentences == [tuple(row[column] for column in TASKS[name].sentences) for row in rows]
    labels = [row[TASKS[name].label] for row in rows]
    kind = np.int32 if TASKS[name].classes else np.float32
    expected = [TASKS[name].classes.index(label) if TASKS[name].classes else float(label) for label in labels]
    assert found[split].labels.dtype == kind and found[split].labels.tolist() == expected


def read_rte(folder: Path, train: bytes, rows: int):
  """Reads RTE with the train file `train`, which should have `rows` rows, and a valid dev file."""
  task = TASKS["rte"]._replace(rows={"train": rows, "dev": 3})
  glue_files.write_task(folder, "rte", task)
  (folder / "RTE" / "train.tsv.gz").unlink()
  (folder / "RTE" / "train.tsv").write_bytes(train)
  return glue.read_task(task, str(folder))["train"]


HEADER = b"index\tsentence1\tsentence2\tlabel\n"
GOOD = b"0\tone\ttwo\tentailment\n"


def test_quotes_are_literal_and_only_newlines_end_rows(tmp_path):
  text = '"Open quote\u2028, \x85 and\r\x0b\tno "" end \tentailment\r\n'.encode()
  rows = read_rte(tmp_path, b"\xef\xbb\xbf" + HEADER + b"0\t" + text + b"1\t'\t\"\tnot_entailment\n", 2)
  assert rows.sentences == [('"Open quote\u2028, \x85 and', 'no "" end'), ("'", '"')] and rows.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
  ("train", "message"),
  [
    (HEADER + GOOD * 3, r"RTE, train, must have 2 rows; found 3 in .*; restore the file"),
    (HEADER + GOOD, r"must have 2 rows; found 1"),
    (HEADER + GOOD + b"1\tone\tentailment\n", r"train\.tsv, line 3, must have 4 columns \(index, .*\); found 3"),
    (HEADER + GOOD + b"1\ta\tb\tc\tentailment\n", r"line 3, must have 4 columns .*; found 5"),
    (HEADER + GOOD + b"\n", r"line 3, must have 4 columns"),
    (
      GOOD * 2,
      r"columns sentence1, sentence2, label; its first line lacks sentence1, .* check that it is a file of RTE",
    ),
    (b"", r"its first line lacks .* and has nothing"),
    (HEADER + GOOD + b"1\tone\ttwo\t1\n", r"line 3: the label must be one of entailment, not_entailment; found '1'"),
    (HEADER + b"0\tcaf\xe9\ttwo\tentailment\n", r"train\.tsv must be UTF-8 text.*UnicodeDecodeError"),
  ],
)
def test_a_malformed_file_is_a_user_error(tmp_path, train, message):
  with pytest.raises(UserError, match=message):
    read_rte(tmp_path, train, 2)


@pytest.mark.parametrize(
  "line", [b"sentence\tlabel\n", b"gj04\t1\t\tA sentence.\tanother\n", b"gj04\tyes\t\tA sentence.\n"]
)
def test_a_malformed_first_line_without_a_header_is_a_user_error(tmp_path, line):
  """CoLA has four columns: source, label, author's mark, sentence."""
  glue_files.write_task(tmp_path, "cola", SMALL["cola"])
  (tmp_path / "CoLA" / "train.tsv.gz").unlink()
  (tmp_path / "CoLA" / "train.tsv").write_bytes(line + b"gj04\t1\t\tA sentence.\n" * 5)
  with pytest.raises(UserError, match=r"CoLA.*line 1"):
    glue.read_task(SMALL["cola"], str(tmp_path))


def test_a_missing_or_truncated_file_is_a_user_error(tmp_path):
  with pytest.raises(UserError, match=r"--data=.* must hold RTE/train\.tsv or \.tsv\.gz; found neither; or use"):
    glue.read_task(TASKS["rte"], str(tmp_path))
  glue_files.write_task(tmp_path, "rte", SMALL["rte"])
  path = tmp_path / "RTE" / "train.tsv.gz"
  path.write_bytes(path.read_bytes()[:-9])
  with pytest.raises(UserError, match=r"train\.tsv\.gz must be .* EOFError"):
    glue.read_task(SMALL["rte"], str(tmp_path))
  path.write_bytes(HEADER)
  with pytest.raises(UserError, match=r"gzipped if it ends in \.gz.*BadGzipFile"):
    glue.read_task(SMALL["rte"], str(tmp_path))


@pytest.mark.parametrize("value", ["5.1", "-1", "nan", "high", ""])
def test_a_score_is_a_number_from_0_to_5(tmp_path, value):
  rows = glue_files.made_up_rows("stsb", 6, 0)
  rows[4]["score"] = value
  glue_files.write_task(tmp_path, "stsb", SMALL["stsb"])
  glue_files.write_rows(tmp_path / "STS-B" / "train.tsv.gz", "stsb", rows)
  with pytest.raises(UserError, match=rf"line 6: the score must be a number between 0 and 5; found '{value}'"):
    glue.read_task(SMALL["stsb"], str(tmp_path))


def test_an_unknown_task_lists_the_known_ones():
  assert glue.task_named("cola") is TASKS["cola"]
  with pytest.raises(UserError, match=r"the task \(='qnli'\) must be one of cola, stsb, mrpc, rte, sst2"):
    glue.task_named("qnli")


@pytest.mark.parametrize("name", ["rte", "stsb", "cola"])
def test_the_hub_dataset_is_read(monkeypatch, name):
  import datasets

  def load_dataset(path, subset, *, split):
    assert (path, subset) == ("nyu-mll/glue", name)
    count = SMALL[name].rows[{"train": "train", "validation": "dev"}[split]]
    texts = {column: ["some words "] * count for column in (("sentence",) if name == "cola" else glue.BOTH)}
    labels = [4.5, 0.0, 1.0] * 2 if name == "stsb" else [0, 1, 1] * 2
    return datasets.Dataset.from_dict(texts | {"label": labels[:count], "idx": list(range(count))})

  monkeypatch.setattr(datasets, "load_dataset", load_dataset)
  rows = glue.read_task(SMALL[name], "hub")["dev"]
  assert rows.sentences == [("some words",) * len(TASKS[name].sentences)] * 3
  assert rows.labels.tolist() == ([4.5, 0, 1] if name == "stsb" else [0, 1, 1])
  with pytest.raises(UserError, match=r"must have 2,?490 rows|must have 5,749 rows|must have 8,551 rows"):
    glue.read_task(TASKS[name], "hub")


def test_an_unreachable_hub_is_a_user_error(monkeypatch):
  import datasets

  def load_dataset(*_, **__):
    raise ConnectionError("no route\nto host")

  monkeypatch.setattr(datasets, "load_dataset", load_dataset)
  with pytest.raises(
    UserError, match=r"nyu-mll/glue, rte, could not be read .*ConnectionError: no route to host; it needs"
  ):
    glue.read_task(TASKS["rte"], "hub")


def test_a_random_subset_is_deterministic():
  rows = glue.LabelledTexts([(str(i),) for i in range(100)], np.arange(100))
  part = glue.random_subset(rows, 10)
  assert len(set(part.sentences)) == 10 and [int(text) for (text,) in part.sentences] == part.labels.tolist()
  assert (
    part.labels.tolist() != list(range(10)) and part.labels.tolist() == glue.random_subset(rows, 10).labels.tolist()
  )
  assert glue.random_subset(rows, 100) is rows and glue.random_subset(rows, None) is rows


# --- metrics --------------------------------------------------------------------------------------------------------


def test_metrics_match_hand_computed_values():
  # True and false positives and negatives: 3, 1, 2, 4.
  predictions, labels = np.array([1] * 4 + [0] * 6), np.array([1, 1, 1, 0, 1, 1, 0, 0, 0, 0])
  matthews = (3 * 4 - 1 * 2) / np.sqrt((3 + 1) * (3 + 2) * (4 + 1) * (4 + 2))
  assert score_predictions(TASKS["cola"], predictions, labels) == pytest.approx(matthews)
  assert score_predictions(TASKS["rte"], predictions, labels) == 0.7
  # Deviations from the means: (-1, 0, 1) and (-2, 1, 1), so 3 / √(2·6).
  assert score_predictions(TASKS["stsb"], np.array([1.0, 2, 3]), np.array([0.0, 3, 3])) == pytest.approx(
    3 / np.sqrt(12)
  )
  assert score_predictions(TASKS["stsb"], np.array([3.0, 2, 1]), np.array([0.0, 3, 3])) == pytest.approx(
    -3 / np.sqrt(12)
  )


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=50))
def test_matthews_correlation_matches_the_confusion_matrix(pairs):
  predictions, labels = np.array(pairs).T
  tp, fp, fn, tn = (int(np.sum((predictions == a) & (labels == b))) for a, b in ((1, 1), (1, 0), (0, 1), (0, 0)))
  product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
  expected = (tp * tn - fp * fn) / np.sqrt(product) if product else 0
  assert score_predictions(TASKS["cola"], predictions, labels) == pytest.approx(expected, abs=1e-12)


def test_predictions_are_the_argmax_or_the_output():
  outputs = np.array([[0.1, 0.2], [3.0, -1.0]], np.float32)
  assert predictions_of(TASKS["rte"], outputs).tolist() == [1, 0]
  assert predictions_of(TASKS["stsb"], outputs[:, :1]).tolist() == outputs[:, 0].tolist()


def test_majority_baseline():
  labels = np.array([1, 1, 0, 1], np.int32)
  assert majority_baseline(TASKS["rte"], labels) == 0.75 and majority_baseline(TASKS["cola"], labels) == 0
  assert majority_baseline(TASKS["stsb"], np.array([1.0, 2.0])) == 0


# --- the real files -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL.is_dir(), reason="the GLUE files are not available")
@pytest.mark.parametrize("name", TASKS)
def test_the_real_glue_files_are_read(name):
  found = glue.read_task(TASKS[name], str(REAL))  # checks columns, labels and the number of rows
  labels = found["dev"].labels
  assert all(text for row in found["train"].sentences for text in row)
  assert {len(row) for row in found["train"].sentences} == {len(TASKS[name].sentences)}
  expected = {"cola": 0.6913, "mrpc": 0.6838, "rte": 0.5271, "sst2": 0.5092}  # of the most frequent class
  if name in expected:
    assert np.bincount(labels).max() / len(labels) == pytest.approx(expected[name], abs=1e-4)
