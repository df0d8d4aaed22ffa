"""Exports a run as a Hugging Face folder.

The weights are merged and written under a temporary name; the folder is read back and its logits are compared with the
run's before it is renamed.
"""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors import SafetensorError

from switchlora_jax.errors import UserError
from switchlora_jax.interop import huggingface, pretrained
from switchlora_jax.lowrank.kernel_storage import forward_kernel, frozen_layers
from switchlora_jax.lowrank.layers import ADAPTER, merge
from switchlora_jax.models import make_model
from switchlora_jax.runs import directory as run_directory
from switchlora_jax.runs import tokenizer_files

RECORD = "export.json"  # marks a folder as an earlier export
FILES = {
  "model.safetensors",
  "config.json",
  "generation_config.json",
  *tokenizer_files.KEPT,
  RECORD,
}
DTYPES = ("float32", "bfloat16")
TOLERANCE = 1e-4  # absolute, of logits
SEQUENCES, LENGTH = 4, 64  # of the random ids that logits are compared on; at most the run's seq_len


class Exported(NamedTuple):
  """The result of an export.

  Attributes:
    origin: the run and the step.
    difference: largest absolute difference of logits between the folder and the run's own model; in bfloat16, between
      the folder and the run's merged weights, rounded.
    rounding: in bfloat16, largest absolute difference of logits between these rounded weights and the run's own model.
    adapters: {kind of layer: ‖s·AᵀB‖ / ‖base‖} over all layers of a kind; {} without base kernels.
    remarks: sentences on the tokenizer; see `tokenizer_json.convert`.
  """

  origin: str
  difference: float
  rounding: float | None
  adapters: dict[str, float]
  remarks: list[str]


def export(run_folder: Path, out: Path, dtype: str = "float32") -> Exported:
  """Exports the newest valid checkpoint of a run to the folder `out`, which is created only if the logits agree.

  Args:
    dtype: of the tensors, one of `DTYPES`.
  Raises:
    UserError: there is no such run, `out` holds other files, or the logits of the written folder differ from the run's.
  """
  out = out.resolve()  # if it is a link, the target is replaced
  check_out(out, [RECORD])
  unverified = out.with_name(out.name + ".unverified")
  check_out(unverified, [])
  weights = pretrained.restore_weights(run_directory.open_run(run_folder))
  model = pretrained.merge(weights)
  shutil.rmtree(unverified, ignore_errors=True)
  try:
    unverified.mkdir(parents=True)
    remarks = huggingface.write_folder(unverified, model.architecture, model.weights, weights.run.tokenizer, dtype)
  except (OSError, SafetensorError) as error:  # safetensors raises the latter on a full disk
    reason = getattr(error, "strerror", None) or error
    raise UserError(f"--out={out} cannot be written ({reason}); choose a directory that can") from error
  difference, rounding = largest_differences(weights, model, unverified, dtype)
  if not difference <= TOLERANCE:
    raise UserError(
      f"the export of {model.origin} is wrong: its logits differ from the run's by {difference:.1e}, more than "
      f"{TOLERANCE:.0e}; it was left in {unverified} and must not be used; please report it"
    )
  record = {"origin": model.origin, "largest_difference_of_logits": difference}
  record |= {} if rounding is None else {"largest_difference_by_rounding": rounding}
  (unverified / RECORD).write_text(json.dumps(record | {"git_revision": run_directory.git_revision()}, indent=2) + "\n")
  shutil.rmtree(out, ignore_errors=True)
  unverified.rename(out)
  return Exported(model.origin, difference, rounding, adapter_norms(weights), remarks)


def check_out(folder: Path, needed: list[str]):
  """Raises `UserError` unless the folder is missing, empty, or has only files of an export, with the `needed` ones."""
  if folder.exists() and not folder.is_dir():
    raise UserError(f"{folder} must be a folder to write to; it is a file; choose another --out")
  names = {path.name for path in folder.glob("*")}
  if names - FILES or (names and not names.issuperset(needed)):
    found = ", ".join(sorted(names - FILES or names)[:3])
    raise UserError(f"{folder} must be new, empty or an earlier export; it holds {found}; choose another --out")


def largest_differences(
  weights: pretrained.RunWeights, merged: pretrained.Pretrained, folder: Path, dtype: str
) -> tuple[float, float | None]:
  """`Exported.difference` and `Exported.rounding` of a folder that was written, on random ids, in float32 or wider.

  The run's model applies base kernels and adapters separately, as in training; in the folder they are merged.
  """
  model = pretrained.read(huggingface.inspect_folder(folder))
  plain, shape = make_model(model.architecture), (SEQUENCES, min(LENGTH, merged.seq_len))
  tokens = np.random.default_rng(0).integers(0, model.architecture["vocab_size"], shape)
  with pretrained.full_precision(weights.run.config.param_dtype):
    ours = _logits(weights.model, {"params": weights.params, "frozen": weights.frozen}, tokens)
    theirs = _logits(plain, {"params": model.weights}, tokens)
    if dtype == "float32":
      return float(np.abs(ours - theirs).max()), None
    narrow = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)).astype(np.float32), merged.weights)
    rounded = _logits(plain, {"params": narrow}, tokens)
  return float(np.abs(rounded - theirs).max()), float(np.abs(rounded - ours).max())


def _logits(model, variables, tokens) -> np.ndarray:
  return np.asarray(jax.jit(model.apply)(variables, jnp.asarray(tokens, jnp.int32)), np.float64)


def adapter_norms(weights: pretrained.RunWeights) -> dict[str, float]:
  """{kind of layer: ‖s·AᵀB‖ / ‖base‖}, Frobenius norms over all layers of the kind; {} without base kernels."""

  @jax.jit
  def ratio(kernel, lora_a, lora_b):
    kernel = kernel.astype(jnp.promote_types(kernel.dtype, lora_a.dtype))
    product = merge(kernel, lora_a, lora_b, weights.scale) - kernel
    return jnp.linalg.norm(product.ravel()) / jnp.linalg.norm(kernel.ravel())

  params, found = flatten_dict(weights.params), {}
  with pretrained.full_precision(weights.run.config.param_dtype):
    for path, base in frozen_layers(weights.frozen).items():
      found[path[-1]] = float(ratio(forward_kernel(base), *(params[*path, name] for name in ADAPTER)))
  return found
