"""Pinned digests of packed sequences and of the steps that produce them. A change needs a new FORMAT_VERSION."""

import hashlib
import json

import numpy as np
import pyarrow
import pyarrow.parquet
from paths import GOLDEN
from tiny import sentences, write_lines

from switchlora_jax.data import corpus, documentation, packing, preparation, shards, tokenizer

# After an intended change of the sequences, raise FORMAT_VERSION and pin the new digests.
PINNED = (2, "7c1ccbcaa0b986ce", "aed2204c490b472c")
PINNED_PADDED = (2, "88c12ba77d259843")

MODULES = {
  "sea/tide.py": '''"""The tide rises and falls twice a day because of the moon and of the sun.

Heading
=======

  The first line of this indented block is wide enough to be taken for a wrapped
    one, and so it goes on here.
- An item of a list that has eight words or more.
* Short item.

  >>> print("The tide rises and falls twice a day, says this doctest.")
"""
HEIGHT = 3
"""Attributes have docstrings as well, and this one has eight words or more: yes!"""
''',
  "sea/rock.py": '''class Rock:
  """A rock is a natural mass of minerals and is known by what it is made of.

  The tide rises and falls twice a day because of the moon and of the sun.
  """

  def wash(self):
    """When the tide rises, does it wash the rock until it falls again?"""
''',
  **{
    f"sea/shore_{n}.py": f'"""Shore number {n} has one sentence of eight words at least, and no more."""'
    for n in range(40)
  },
}


def digest_of_text_processing(folder, monkeypatch) -> str:
  """Hash of what `digest_of_sequences` does not cover: cuts of long documents, documentation, SentencePiece options."""
  long = ["no newline " * 200_000, "a line\n" * 200_000, "one newline\n" + "then none " * 150_000]
  cuts = [(len(chunk.text), chunk.ends, chunk.after) for chunk in packing.read_chunks([long])]
  for name, source in MODULES.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(source)
  monkeypatch.setattr(documentation, "_source_files", lambda: sorted((name, folder / name) for name in MODULES))
  options = []
  monkeypatch.setattr(tokenizer.sentencepiece.SentencePieceTrainer, "train", lambda **given: options.append(given))
  tokenizer.train_tokenizer(["text"], 300, folder / "no.model")
  chosen = sorted((key, value) for key, value in options[0].items() if not key.endswith(("_iterator", "_writer")))
  constants = [documentation.SHINGLE, documentation.VALID_SHARE, documentation.FULL_LINE]
  contents = [cuts, documentation.read_documentation(), constants, chosen]
  return hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:16]


def digest_of_sequences(folder, **options) -> str:
  """Hash of the sequences of a fixed text with a committed tokenizer."""
  write_lines(folder / "text" / "a.jsonl", ["", *sentences(0, 40), "é漢😀\n\n  tabs\tand spaces", "\ufeffA mark."])
  (folder / "text" / "b.txt").write_bytes(b"\xef\xbb\xbfA plain text\r\nwith two lines.\n")
  pyarrow.parquet.write_table(pyarrow.table({"text": ["One row.", "", "Another."]}), folder / "text" / "c.parquet")
  (folder / "text" / "d.txt").write_text("words " * 180_000)  # longer than a group
  text = corpus.open_corpus(f"{folder}/text/*", "", corpus.RowOptions(flags="--"))
  request = preparation.Request("fixed", str(GOLDEN / "huggingface" / "bpe.model"), 16, **options)
  manifest = preparation.fill_folder(folder / "rows", request, lambda: text, wait=False, progress=False)
  rows = np.asarray(shards.open_sequences(folder / "rows", manifest["train"]))
  training = list(tokenizer._training_sentences(["one\ntwo " + "x" * 2500, "three"]))
  contents = [shards.fingerprint(manifest), hashlib.sha256(rows.tobytes()).hexdigest(), manifest["train"]["tokens"]]
  contents += [packing.GROUP, packing.SHARD, tokenizer.SAMPLE, training]
  return hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:16]


def test_a_change_of_padded_sequences_needs_a_new_format_version(tmp_path):
  assert (preparation.FORMAT_VERSION, digest_of_sequences(tmp_path, packing="pad")) == PINNED_PADDED


def test_a_change_of_the_sequences_needs_a_new_format_version(tmp_path, monkeypatch):
  found = digest_of_sequences(tmp_path), digest_of_text_processing(tmp_path, monkeypatch)
  assert (preparation.FORMAT_VERSION, *found) == PINNED
