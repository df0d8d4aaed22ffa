"""Documents that count down from a number: no files are needed.

The toy dataset source of CONTRIBUTING.md.
"""

from switchlora_jax.data.corpus import Corpus

LONGEST = 60
ORIGIN = ["countdown", LONGEST]  # changes when the documents change


def open_countdowns() -> Corpus:
  """One part for training and one for validation, each a list of documents."""
  count = lambda start: " ".join(f"{n} bottles of beer, then {n - 1}." for n in range(start, 0, -1))
  documents = [count(start) for start in range(1, LONGEST)]
  return Corpus(train=[documents[::2] + documents[1::4]], valid=[documents[3::4]])
