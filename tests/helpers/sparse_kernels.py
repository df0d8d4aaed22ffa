"""How a layer with a sparse part stores a plain kernel, in NumPy."""

import numpy as np


def low_rank_beside_support(kernel, support, rank, rounds=30):
  """A low-rank matrix near a kernel [in, out] away from the flat positions `support`, by alternating least squares.

  It starts from the truncated singular value decomposition of the kernel with zeros at the support. Each round replaces
  these elements by those of the low-rank matrix.
  """
  beside = kernel.copy()
  beside.ravel()[support] = 0
  left, values, right = np.linalg.svd(beside, full_matrices=False)
  low, rows = (left[:, :rank] * values[:rank]) @ right[:rank], right[:rank]
  for _ in range(rounds):
    filled = kernel.copy()
    filled.ravel()[support] = low.ravel()[support]
    columns, _ = np.linalg.qr(filled @ rows.T)
    rows = columns.T @ filled
    low = columns @ rows
  return low
