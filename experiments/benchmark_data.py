"""Throughput of the data pipeline: tokenizing a corpus, and reading batches during training.

python -m experiments.benchmark_data --path='c4/*.json.gz' --tokenizer=t5.model

Prints the size and the reading speed of each format, and the tokens per second of the tokenizer alone, of the whole
preparation (read, decompress, tokenize, pack, write, checksum), and of shuffled batches of the packed rows. For a
tokenizer.json, it also prints those of `encode_batch` of the tokenizers library. Core-seconds are processor time summed
over all threads.
"""

import collections
import itertools
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import tokenizers
from absl import flags

from experiments.common import cli
from switchlora_jax.data import corpus, loader, packing, preparation, shards, tokenizer
from switchlora_jax.data.readers import COMPRESSED, RowOptions, file_format, pieces_of
from switchlora_jax.errors import UserError
from switchlora_jax.progress import progress_bar
from switchlora_jax.runs.tokenizer_files import is_fast

PATH = flags.DEFINE_string("path", "", "glob of text, JSON lines or Parquet files, possibly compressed")
TOKENIZER = flags.DEFINE_string(
  "tokenizer", "", "SentencePiece model, tokenizer.json, folder with one, or hub:NAME[@REVISION]"
)
CHARACTERS = flags.DEFINE_integer(
  "characters", 40_000_000, "characters of text to prepare; the text is repeated to reach this length", lower_bound=1
)
SHARDS = flags.DEFINE_integer(
  "shards", 700, "number of shards to read batches from; 46M documents of C4 give about 700", lower_bound=1
)
BATCHES = ((8, 128), (1152, 512))  # (batch_size, seq_len) of the tiny model, and of the paper's
READ = 20_000_000  # tokens read per batch shape


class Stopwatch:
  """Wall-clock and processor seconds since its creation."""

  def __init__(self):
    self._wall, self._core = time.perf_counter(), time.process_time()

  def read(self) -> tuple[float, float]:
    """(wall-clock seconds, core-seconds)."""
    return time.perf_counter() - self._wall, time.process_time() - self._core


def print_result(what: str, tokens: int, watch: Stopwatch):
  """Prints million tokens per second and per core-second."""
  wall, core = watch.read()
  print(f"{what:34} {tokens / wall / 1e6:10.2f} {tokens / core / 1e6:16.2f}")


def read_documents(paths: list[str]) -> list[str]:
  """All documents. Prints the size of the files and the reading speed of each format."""
  texts, sizes = [], collections.defaultdict(lambda: [0, 0, 0.0])  # format: bytes on disk, bytes of text, seconds
  for path in progress_bar(paths, desc="read", unit="file"):
    start = time.perf_counter()
    found = ["".join(pieces_of(text)) for text in corpus.LocalFile(path)]
    seconds = time.perf_counter() - start
    suffix = os.path.splitext(path.lower())[1]
    kind = file_format(path) + (suffix if suffix in COMPRESSED else "")
    added = os.path.getsize(path), sum(len(text.encode()) for text in found), seconds
    sizes[kind] = [total + more for total, more in zip(sizes[kind], added, strict=True)]
    texts += found
  for kind, (size, read, seconds) in sorted(sizes.items()):
    print(f"{kind:14} {size / 1e6:10.2f} MB on disk {read / 1e6 / seconds:10.1f} MB of text per second")
  return texts


def time_tokenizer(path: Path, texts: list[str]):
  """The tokenizer alone, on one thread and on all cores."""
  model, kind = tokenizer.load_tokenizer(path), "tokenizers" if is_fast(path) else "SentencePiece"
  for parallel in (False, True):
    watch = Stopwatch()
    tokens = sum(map(len, model.encode(texts, parallel)))
    print_result(f"{kind}, {'all cores' if parallel else 'one thread'}", tokens, watch)
  if is_fast(path):
    library = tokenizers.Tokenizer.from_file(str(path))
    watch = Stopwatch()
    tokens = sum(len(encoding.ids) for encoding in library.encode_batch(texts, add_special_tokens=False))
    print_result("encode_batch of the library", tokens, watch)


def time_preparation(folder: Path, parts: packing.Parts, path: Path, seq_len: int) -> shards.PackedSequences:
  """Times the whole preparation, from files to shards with checksums. Returns the packed sequences."""
  request = preparation.Request([], str(path), seq_len)
  watch = Stopwatch()
  manifest = preparation.fill_folder(folder, request, lambda: corpus.Corpus(parts, None), wait=False, progress=False)
  print_result(f"preparation, rows of {seq_len}", manifest["train"]["tokens"], watch)
  return shards.open_sequences(folder, manifest["train"])


def reshard(sequences: shards.PackedSequences, folder: Path) -> shards.PackedSequences:
  """Copies the sequences into `--shards` shards, as many as a large corpus has."""
  rows = max(1, len(sequences) // SHARDS.value)
  parts = [np.asarray(sequences[start : start + rows]) for start in range(0, len(sequences), rows)]
  written = [shards.write_shard(folder / f"shard-{number}.npy", part) for number, part in enumerate(parts)]
  return shards.open_sequences(folder, {"shards": written, "rows": len(sequences)})


def time_batches(sequences: shards.PackedSequences, batch_size: int):
  """Times the batches of consecutive steps, as the trainer reads them."""
  seq_len = sequences.shape[1]
  steps = max(3, READ // (batch_size * seq_len))
  read = lambda step: loader.shuffled_batch(sequences, seed=0, step=step, batch_size=batch_size)[:]
  read(0)
  watch = Stopwatch()
  for step in range(steps):
    read(step)
  milliseconds = watch.read()[0] / steps * 1000
  print_result(f"batches of {batch_size} × {seq_len}, {milliseconds:.2f} ms", steps * batch_size * seq_len, watch)


def main():
  """Times the tokenizer, then the preparation and the batches for each batch shape."""
  files = corpus.open_corpus(PATH.value, "", RowOptions(flags="--")).train
  path = tokenizer.locate(TOKENIZER.value, "--tokenizer")
  tokenizer.load_tokenizer(path)
  texts = read_documents([file.path for file in files])
  if not (length := sum(map(len, texts))):
    raise UserError(
      f"--path (={PATH.value!r}) must match text; the {len(files)} matching files are empty; pass other files"
    )
  print(f"{len(texts):,} documents, {length:,} characters")
  print(f"{'million tokens':34} {'per second':>10} {'per core-second':>16}")
  time_tokenizer(path, texts)
  parts = list(itertools.chain.from_iterable([files] * -(-CHARACTERS.value // length)))
  for batch_size, seq_len in BATCHES:
    with tempfile.TemporaryDirectory() as scratch:
      sequences = time_preparation(Path(scratch), parts, path, seq_len)
      time_batches(reshard(sequences, Path(scratch)), batch_size)


if __name__ == "__main__":
  cli.run(main)
