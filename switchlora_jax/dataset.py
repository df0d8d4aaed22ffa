"""Text → packed rows of tokens on disk → the batch of step t, a pure function of (seed, t).

Rows are kept in a folder of `cache_dir` whose name says what they were made from. It is filled under
another name and renamed when it is complete, so a folder with that name is never half done; what a
killed run leaves is named `….partial` and may be deleted.
"""

import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
from tqdm import tqdm

from switchlora_jax import corpus, tokenizer
from switchlora_jax.errors import UserError
from switchlora_jax.order import shuffled

HELD_OUT = 100  # one row in so many validates where the text has no validation files


@dataclass(frozen=True)
class Batch:
  """Rows of `rows` [n, seq_len] by their numbers, `picks` [batch]; read when it is sliced, and only that slice."""

  rows: np.ndarray
  picks: np.ndarray

  @property
  def shape(self) -> tuple[int, int]:
    """(batch, seq_len)."""
    return len(self.picks), self.rows.shape[1]

  def __getitem__(self, part: slice) -> np.ndarray:
    """That part of the batch, int32 [part, seq_len]."""
    return np.asarray(self.rows[self.picks[part]], np.int32)


class Dataset(NamedTuple):
  """Packed rows, and what they are.

  Attributes:
    train: [rows, seq_len], uint16 or int32, on disk.
    valid: [rows, seq_len], likewise.
    tokenizer_path: the SentencePiece model of the tokens.
    fingerprint: of the rows and the tokenizer, 16 hexadecimal digits; where they were made does not change it.
    summary: sizes to print: source, fingerprint, and of train and valid the documents, characters, tokens and rows.
  """

  train: np.ndarray
  valid: np.ndarray
  tokenizer_path: str
  fingerprint: str
  summary: dict


def check(data, *, vocab_size: int) -> None:
  """Find what is wrong with `config.data` before anything expensive: source, globs, tokenizer."""
  if data.source == "docs" and (data.path or data.eval_path):
    raise UserError(
      f"--config.data.path (={data.path or data.eval_path!r}) is not read when --config.data.source is docs; "
      "add --config.data.source=text to train on your files, or leave the path out"
    )
  _origin(data)
  if data.tokenizer:
    tokenizer.load_tokenizer(os.path.expanduser(data.tokenizer), vocab_size)


def prepare(data, *, seq_len: int, vocab_size: int, batch_size: int, progress: bool = True) -> Dataset:
  """The rows of `config.data`, packed now or taken from an earlier run's `cache_dir`.

  Documents are joined, each ended by EOS, and cut into rows of `seq_len` tokens; the remainder is
  dropped. Text without validation files lends its last hundredth of the rows, at least one.
  """
  check(data, vocab_size=vocab_size)
  cache = Path(data.cache_dir).expanduser()
  folder = cache / _key(data, seq_len, vocab_size)
  if not folder.exists():
    with _workspace(cache, folder.name) as partial:
      _build(Path(partial, "rows"), data, seq_len, vocab_size, progress)
      _publish(Path(partial, "rows"), folder)
  dataset = _open(folder)
  _check_size(dataset, data, batch_size)
  return dataset


def batch(rows: np.ndarray, *, seed: int, step: int, batch_size: int) -> Batch:
  """The batch of a step, [batch_size, seq_len]: each epoch takes every row once, in an order of its own."""
  epochs, places = np.divmod(step * batch_size + np.arange(batch_size), len(rows))
  each = [shuffled(places[epochs == epoch], len(rows), seed=seed, epoch=epoch) for epoch in np.unique(epochs)]
  return Batch(rows, np.concatenate(each))


def _origin(data) -> list:
  """What the text is made from, as JSON: it changes when the text may have changed."""
  if data.source == "docs":
    return sorted(corpus.package_versions().items())
  if data.source == "text":
    files = [part.files if part else () for part in corpus.text_files(data.path, data.eval_path)]
    return [[(os.path.abspath(file), *_stamp(file)) for file in part] for part in files]
  raise UserError(
    f"--config.data.source must be docs (documentation of the installed packages) or text (your own files); "
    f"found {data.source!r}; for your files pass --config.data.source=text --config.data.path='c4/*.json.gz'"
  )


def _stamp(file: str) -> tuple[int, int]:
  status = os.stat(file)
  return status.st_size, status.st_mtime_ns


def _key(data, seq_len: int, vocab_size: int) -> str:
  """A name for everything that decides the rows, this code included."""
  digest = hashlib.sha256()
  for module in (corpus, tokenizer):
    digest.update(Path(module.__file__).read_bytes())
  digest.update(Path(__file__).read_bytes())
  digest.update(Path(data.tokenizer).expanduser().read_bytes() if data.tokenizer else b"")
  facts = [data.source, _origin(data), seq_len, vocab_size, sentencepiece.__version__]
  digest.update(json.dumps(facts).encode())
  return f"{data.source}-{digest.hexdigest()[:16]}"


def _workspace(cache: Path, name: str) -> tempfile.TemporaryDirectory:
  try:
    cache.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(dir=cache, prefix=f"{name}.", suffix=".partial")
  except OSError as error:
    raise UserError(
      f"--config.data.cache_dir (={str(cache)!r}) must be a directory that can be written; {error}; name another"
    ) from error


def _build(folder: Path, data, seq_len: int, vocab_size: int, progress: bool) -> None:
  """Fill `folder` with tokenizer.model, train.npy, summary.json, and valid.npy where validation has its own text."""
  folder.mkdir()
  docs = data.source == "docs"
  text = corpus.documentation(progress) if docs else corpus.text_files(data.path, data.eval_path)
  model = folder / "tokenizer.model"
  if data.tokenizer:
    shutil.copyfile(os.path.expanduser(data.tokenizer), model)
  else:
    tokenizer.train_tokenizer(text.train, vocab_size, model)
  processor = tokenizer.load_tokenizer(model, vocab_size)
  dtype = np.uint16 if vocab_size <= 1 << 16 else np.int32
  write = functools.partial(_write_rows, processor=processor, seq_len=seq_len, dtype=dtype, progress=progress)
  train = write(folder / "train.npy", text.train)
  valid = write(folder / "valid.npy", text.valid) if text.valid is not None else _hold_out(train, seq_len)
  summary = {"source": data.source, "fingerprint": _fingerprint(folder), "train": train, "valid": valid}
  if docs:
    summary["overlap"] = corpus.overlap(text.train, text.valid)
  (folder / "summary.json").write_text(json.dumps(summary))


def _write_rows(path: Path, documents: Iterable[str], *, processor, seq_len: int, dtype, progress: bool) -> dict:
  """Write an .npy of [rows, seq_len], a million characters at a time; how much it is."""
  sizes, rest = {"documents": 0, "characters": 0, "tokens": 0, "rows": 0}, np.empty(0, dtype)
  with open(path, "wb") as file, tqdm(desc="tokenize", unit="char", unit_scale=True, disable=not progress) as bar:

    def report(documents, characters):
      sizes["documents"] += documents
      sizes["characters"] += characters
      bar.update(characters)

    _write_header(file, 0, seq_len, dtype)
    for tokens in tokenizer.encode_documents(processor, documents, report):
      stream = np.concatenate([rest, tokens.astype(dtype)])
      rows = len(stream) // seq_len
      file.write(stream[: rows * seq_len].tobytes())
      rest = stream[rows * seq_len :]
      sizes["tokens"] += len(tokens)
      sizes["rows"] += rows
    file.seek(0)
    _write_header(file, sizes["rows"], seq_len, dtype)
  return sizes


def _write_header(file, rows: int, seq_len: int, dtype) -> None:
  """The header of an .npy; NumPy pads it so that any number of rows takes the same space."""
  shape, descr = (rows, seq_len), np.lib.format.dtype_to_descr(np.dtype(dtype))
  np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})


def _hold_out(train: dict, seq_len: int) -> dict:
  """Sizes of the last rows of `train`, which validate; `train` is left the others."""
  rows = min(train["rows"], max(1, train["rows"] // HELD_OUT))
  train["rows"] -= rows
  return {"held out of": "train, its last rows", "tokens": rows * seq_len, "rows": rows}


def _fingerprint(folder: Path) -> str:
  """Of the tokenizer and the rows; the same wherever and from whichever files they were made."""
  digest = hashlib.sha256()
  for path in sorted(folder.iterdir()):
    with open(path, "rb") as file:
      digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
  return digest.hexdigest()[:16]


def _publish(finished: Path, folder: Path) -> None:
  try:
    os.rename(finished, folder)
  except OSError:
    if not folder.exists():  # else another process made the same rows meanwhile
      raise


def _open(folder: Path) -> Dataset:
  summary = json.loads((folder / "summary.json").read_text())
  stored = np.load(folder / "train.npy", mmap_mode="r")
  train, rest = np.split(stored, [summary["train"]["rows"]])
  valid = np.load(folder / "valid.npy", mmap_mode="r") if (folder / "valid.npy").exists() else rest
  return Dataset(train, valid, str(folder / "tokenizer.model"), summary["fingerprint"], summary)


def _check_size(dataset: Dataset, data, batch_size: int) -> None:
  rows, seq_len = dataset.train.shape
  if rows < batch_size:
    raise UserError(
      f"the text must fill one batch, {batch_size} rows of {seq_len} tokens (={batch_size * seq_len:,}) besides "
      f"validation; it has {dataset.summary['train']['tokens']:,} tokens, {rows} rows to train on; "
      "add text, or lower --config.batch_size or --config.seq_len"
    )
  if not len(dataset.valid):
    raise UserError(
      f"--config.data.eval_path (={data.eval_path!r}) must hold at least one row of {seq_len} tokens; it has "
      f"{dataset.summary['valid']['tokens']:,}; add text, or leave it empty to hold out the last rows"
    )
