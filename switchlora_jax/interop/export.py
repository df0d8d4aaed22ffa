"""A run as a Hugging Face LLaMA folder: merged, written under another name, read back, compared, and then renamed."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError

from switchlora_jax.errors import UserError
from switchlora_jax.interop import huggingface, pretrained
from switchlora_jax.lowrank.kernel_storage import KERNEL, frozen_layers
from switchlora_jax.lowrank.layers import ADAPTER, merge
from switchlora_jax.models import make_model
from switchlora_jax.runs import directory as run_directory

RECORD = "export.json"  # by which an export knows its own folder
FILES = {
  "model.safetensors",
  "config.json",
  "generation_config.json",
  "tokenizer.model",
  "tokenizer.json",
  "tokenizer_config.json",
  RECORD,
}
TOLERANCE = 1e-4  # of logits, absolute
ROWS, LENGTH = 4, 64  # of the random ids that logits are compared on; shorter where the run's rows are


class Exported(NamedTuple):
  """What an export hands to its report.

  Attributes:
    origin: the run and the step.
    difference: largest absolute difference of logits between the folder and the run's own model.
    adapters: {kind of layer: ‖s·AᵀB‖ / ‖base‖} over all layers of a kind; {} where there are no adapters.
    remarks: sentences on the tokenizer.
  """

  origin: str
  difference: float
  adapters: dict[str, float]
  remarks: list[str]


def export(run_folder: Path, out: Path) -> Exported:
  """Export the newest good checkpoint of a run to `out`, which exists afterwards only if it was found right.

  Raises:
    UserError: before anything is written where there is no such run or `out` is another's; after it where the
      folder's logits are not the run's.
  """
  out = out.resolve()  # a link stays one, to the new folder
  check_out(out, [RECORD])
  unverified = out.with_name(out.name + ".unverified")
  check_out(unverified, [])
  run = pretrained.open_run(run_folder)
  model = pretrained.merge(run)
  shutil.rmtree(unverified, ignore_errors=True)
  try:
    unverified.mkdir(parents=True)
    remarks = huggingface.write(unverified, model.sizes, model.weights, model.seq_len, model.tokenizer)
  except (OSError, SafetensorError) as error:  # the latter of a full disk, too
    reason = getattr(error, "strerror", None) or error
    raise UserError(f"--out={out} cannot be written ({reason}); choose a directory that can") from error
  difference = largest_difference(run, unverified)
  if not difference <= TOLERANCE:
    raise UserError(
      f"the export of {model.origin} is wrong: its logits differ from the run's by {difference:.1e}, more than "
      f"{TOLERANCE:.0e}; it was left in {unverified} and must not be used; please report it"
    )
  record = {"origin": model.origin, "largest_difference_of_logits": difference}
  (unverified / RECORD).write_text(json.dumps(record | {"git_revision": run_directory.git_revision()}, indent=2) + "\n")
  shutil.rmtree(out, ignore_errors=True)
  unverified.rename(out)
  return Exported(model.origin, difference, adapter_norms(run), remarks)


def check_out(folder: Path, needed: list[str]):
  """Raise `UserError` unless the folder is missing, empty, or all that is in it are an export's files."""
  if folder.exists() and not folder.is_dir():
    raise UserError(f"{folder} must be a folder to write to; it is a file; choose another --out")
  names = {path.name for path in folder.glob("*")}
  if names - FILES or (names and not names.issuperset(needed)):
    found = ", ".join(sorted(names - FILES or names)[:3])
    raise UserError(f"{folder} must be new, empty or an earlier export; it holds {found}; choose another --out")


def largest_difference(run: pretrained.Run, folder: Path) -> float:
  """Largest absolute difference of logits on random ids: the folder read back, and the run as training applies it.

  In float32: adapters and base are apart in the run's model, and merged in the folder.
  """
  model = pretrained.load_folder(folder)
  shape = (ROWS, min(LENGTH, model.seq_len))
  tokens = np.random.default_rng(0).integers(0, model.sizes["vocab_size"], shape)
  with pretrained.exactly(run.config.param_dtype):
    ours = _logits(run.phase.model, {"params": run.state.params, "frozen": run.state.frozen}, tokens)
    theirs = _logits(make_model(model.sizes), {"params": model.weights}, tokens)
  return float(np.abs(ours - theirs).max())


def _logits(model, variables, tokens) -> np.ndarray:
  return np.asarray(jax.jit(model.apply)(variables, jnp.asarray(tokens, jnp.int32)), np.float64)


def adapter_norms(run: pretrained.Run) -> dict[str, float]:
  """{kind of layer: ‖s·AᵀB‖ / ‖base‖}, Frobenius norms over all layers of the kind."""

  @jax.jit
  def ratio(kernel, lora_a, lora_b):
    kernel = kernel.astype(jnp.promote_types(kernel.dtype, lora_a.dtype))
    product = merge(kernel, lora_a, lora_b, run.phase.scale) - kernel
    return jnp.linalg.norm(product.ravel()) / jnp.linalg.norm(kernel.ravel())

  found = {}
  with pretrained.exactly(run.config.param_dtype):
    for path, base in frozen_layers(run.state.frozen).items():
      layer = run.state.params
      for name in path:
        layer = layer[name]
      found[path[-1]] = float(ratio(base[KERNEL], *(layer[name] for name in ADAPTER)))
  return found
