"""What the data cost: tokenising a corpus, and reading its rows while a model trains.

python -m experiments.benchmark_data --path='c4/*.json.gz' --tokenizer=t5.model
Tokens per second of SentencePiece alone, of the whole preparation (read, decompress, tokenise, pack, write, checksum)
and of batches drawn from its rows. Core-seconds are processor time over all threads.
"""

import itertools
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from experiments.common import cli
from switchlora_jax.data import batches, corpus, packing, preparation, shards, tokenizer
from switchlora_jax.errors import UserError

PATH = flags.DEFINE_string("path", "", "glob of plain text, JSON lines or Parquet files, each also compressed")
TOKENIZER = flags.DEFINE_string("tokenizer", "", "a SentencePiece model")
CHARACTERS = flags.DEFINE_integer(
  "characters", 40_000_000, "length of text to prepare; it is repeated to reach it", lower_bound=1
)
SHARDS = flags.DEFINE_integer(
  "shards", 700, "files that batches are drawn from; C4's 46M documents make about as many", lower_bound=1
)
BATCHES = ((8, 128), (1152, 512))  # rows × tokens of the tiny model, and of the paper's
DRAWN = 20_000_000  # tokens of each


class Stopwatch:
  """Wall-clock and processor seconds since it was made."""

  def __init__(self):
    self._wall, self._core = time.perf_counter(), time.process_time()

  def read(self) -> tuple[float, float]:
    """(seconds, seconds of a core)."""
    return time.perf_counter() - self._wall, time.process_time() - self._core


def show(what: str, tokens: int, watch: Stopwatch):
  """One line of results."""
  wall, core = watch.read()
  print(f"{what:34} {tokens / wall / 1e6:8.2f} {tokens / core / 1e6:12.2f}")


def time_tokenizer(model, texts: list[str]):
  """SentencePiece alone, on one thread and on all cores."""
  for threads in (1, -1):
    watch = Stopwatch()
    tokens = sum(map(len, model.encode(texts, num_threads=threads)))
    show(f"SentencePiece, {'one thread' if threads == 1 else 'all cores'}", tokens, watch)


def time_preparation(folder: Path, parts: packing.Parts, seq_len: int) -> shards.Rows:
  """All of it, from compressed files to rows with checksums; the rows."""
  request = preparation.Request([], TOKENIZER.value, seq_len)
  watch = Stopwatch()
  manifest = preparation.prepare(folder, request, lambda: corpus.Corpus(parts, None), wait=False, progress=False)
  show(f"preparation, rows of {seq_len}", manifest["train"]["tokens"], watch)
  return shards.open_rows(folder, manifest["train"])


def in_shards(found: shards.Rows, folder: Path) -> shards.Rows:
  """The same rows in as many files as a large corpus has."""
  each = max(1, len(found) // SHARDS.value)
  parts = [np.asarray(found[start : start + each]) for start in range(0, len(found), each)]
  written = [shards.write_shard(folder / f"shard-{number}.npy", part) for number, part in enumerate(parts)]
  return shards.open_rows(folder, {"shards": written, "rows": len(found)})


def time_batches(found: shards.Rows, batch_size: int):
  """Batches of steps one after another, as the trainer draws them."""
  steps = max(3, DRAWN // (batch_size * found.shape[1]))
  draw = lambda step: batches.batch(found, seed=0, step=step, batch_size=batch_size)[:]
  draw(0)
  watch = Stopwatch()
  for step in range(steps):
    draw(step)
  milliseconds = watch.read()[0] / steps * 1000
  show(f"batches of {batch_size} × {found.shape[1]}, {milliseconds:.2f} ms", steps * batch_size * found.shape[1], watch)


def main():
  """Check, then time each."""
  files = corpus.open_corpus(PATH.value, "", ("--path", "")).train
  model = tokenizer.load_tokenizer(TOKENIZER.value)
  texts = [text for part in tqdm(files, desc="read", unit="file") for text in part]
  if not (length := sum(map(len, texts))):
    raise UserError(f"--path (={PATH.value!r}) must hold text; its {len(files)} files are empty; name others")
  print(f"{len(texts):,} documents, {length:,} characters; million tokens\n{'':34} a second  a core-second")
  time_tokenizer(model, texts)
  parts = list(itertools.chain.from_iterable([files] * -(-CHARACTERS.value // length)))
  for batch_size, seq_len in BATCHES:
    with tempfile.TemporaryDirectory() as scratch:
      found = time_preparation(Path(scratch), parts, seq_len)
      time_batches(in_shards(found, Path(scratch)), batch_size)


if __name__ == "__main__":
  cli.run(main)
