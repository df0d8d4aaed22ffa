"""Numbers recorded from the authors' code and from other libraries, in tests/golden."""

import json

import numpy as np
from paths import GOLDEN


def load(name: str):
  """(arrays, what its .json says) of an extract."""
  with np.load(GOLDEN / f"{name}.npz") as arrays:
    return dict(arrays), json.loads((GOLDEN / f"{name}.json").read_text())
