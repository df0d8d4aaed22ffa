"""The pinned digest of packed sequences, which guards `dataset.FORMAT_VERSION`."""

import hashlib
import json

import numpy as np
import pyarrow
import pyarrow.parquet
from paths import GOLDEN
from tiny import sentences, write_lines

from switchlora_jax.data import corpus, dataset, packing, preparation, shards, tokenizer

# After an intended change of the sequences, raise FORMAT_VERSION and pin the new digest.
PINNED = (1, "f5774901f86dd448")


def digest(folder) -> str:
  """Hash of everything that the version stands for, made of fixed text with a committed tokenizer."""
  write_lines(folder / "text" / "a.jsonl", ["", *sentences(0, 40), "é漢😀\n\n  tabs\tand spaces"])
  (folder / "text" / "b.txt").write_bytes(b"A plain text\r\nwith two lines.\n")
  pyarrow.parquet.write_table(pyarrow.table({"text": ["One row.", "", "Another."]}), folder / "text" / "c.parquet")
  (folder / "text" / "d.txt").write_text("words " * 180_000)  # longer than a group
  text = corpus.open_corpus(f"{folder}/text/*", "", ("--path", "--eval_path"))
  request = preparation.Request("fixed", str(GOLDEN / "huggingface" / "bpe.model"), 16)
  manifest = preparation.fill_folder(folder / "rows", request, lambda: text, wait=False, progress=False)
  rows = np.asarray(shards.open_sequences(folder / "rows", manifest["train"]))
  training = list(tokenizer._training_sentences(["one\ntwo " + "x" * 2500, "three"]))
  contents = [shards.fingerprint(manifest), hashlib.sha256(rows.tobytes()).hexdigest(), manifest["train"]["tokens"]]
  contents += [packing.GROUP, packing.SHARD, tokenizer.SAMPLE, training]
  return hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:16]


def test_a_change_of_the_sequences_needs_a_new_format_version(tmp_path):
  assert (dataset.FORMAT_VERSION, digest(tmp_path)) == PINNED
