"""Training steps of PyTorch's libraries in a process of their own, for `experiments.benchmark --peers=torch`.

A peer is what a user would otherwise train with: the LLaMA of `transformers` with SDPA attention and a fused AdamW, and
the low-rank methods of `peft`, `galore-torch` and `apollo-torch` on it. Its step does the same work as ours: gradients
of the mean cross-entropy, clipping by the global norm, and the optimizer. Only the process that this module starts
imports PyTorch, so that the two libraries share neither threads nor memory.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import subprocess
import sys

from experiments.common import children
from switchlora_jax.errors import UserError

FULL = "torch full"
PACKAGES = {  # of each peer, besides torch
  FULL: "transformers",
  "torch lora": "peft",
  "torch galore": "galore-torch",
  "torch apollo": "apollo-torch",
}
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
COMMAND = (sys.executable, "-m", "experiments.common.torch_peers")
GAP = 200  # steps between two decompositions of GaLore and projections of APOLLO, the default of both


def installed() -> dict[str, str]:
  """{peer: the version of its package} of the peers that can run here, PyTorch's full rank first.

  Raises:
    UserError: PyTorch or transformers is not installed.
  """
  missing = [package for package in ("torch", PACKAGES[FULL]) if not _version(package)]
  if missing:
    raise UserError(
      f"--peers=torch needs {' and '.join(missing)}, which are not installed; install requirements-torch.txt"
    )
  return {peer: f"{package} {_version(package)}" for peer, package in PACKAGES.items() if _version(package)}


def _version(package: str) -> str:
  with contextlib.suppress(importlib.metadata.PackageNotFoundError):
    return importlib.metadata.version(package)
  return ""


class Peers:
  """A process that runs the training steps of peers, one at a time; a context.

  Args:
    model: the contents of a Hugging Face config.json.
    rows: token ids [batch, length] of every step, nested lists.
    dtype: float32, or bfloat16 for autocast on a GPU.
    clip_norm: largest global norm of the gradients.
  """

  def __init__(self, model: dict, rows: list, dtype: str, clip_norm: float):
    self._setting = dict(model=model, rows=rows, dtype=dtype, clip_norm=clip_norm)

  def __enter__(self):
    # Threads of OpenMP that wait for work would otherwise keep a core busy while a step of ours is timed.
    variables = children.environment() | {"OMP_WAIT_POLICY": "PASSIVE"}
    self._process = subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables)
    self._send(self._setting)
    return self

  def __exit__(self, *_):
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.close()
    self._process.wait()

  def step(self, peer: str, rank: int) -> float:
    """Run the next step of a peer, and return its loss in nats; the first call builds the peer.

    Raises:
      UserError: the process ended.
    """
    self._send([peer, rank])
    answer = self._process.stdout.readline()
    if not answer:
      raise UserError(
        f"the process of {peer} ended with exit code {self._process.wait()}; its last lines above say why; "
        "leave out --peers, or set a smaller --config.batch_size if it was out of memory"
      )
    return json.loads(answer)

  def _send(self, message):
    with contextlib.suppress(BrokenPipeError):  # `step` reports it
      self._process.stdin.write(json.dumps(message) + "\n")
      self._process.stdin.flush()


def serve():
  """Read a setting from stdin, then peers with a rank; answer each with the loss of its next step on stdout."""
  setting = json.loads(sys.stdin.readline())
  answers, sys.stdout = sys.stdout, sys.stderr  # what the libraries print must not be read as an answer
  steps = {}
  for line in sys.stdin:
    peer, rank = json.loads(line)
    if (peer, rank) not in steps:
      steps[peer, rank] = make_step(peer, rank, **setting)
    print(json.dumps(steps[peer, rank]()), file=answers, flush=True)


def make_step(peer: str, rank: int, model: dict, rows: list, dtype: str, clip_norm: float):
  """A function that does the next training step of a peer and returns its loss."""
  import torch
  from transformers import AutoConfig, AutoModelForCausalLM

  device = "cuda" if torch.cuda.is_available() else "cpu"
  torch.manual_seed(0)
  tokens = torch.tensor(rows, device=device)
  described = AutoConfig.for_model(**model, use_cache=False)
  model = AutoModelForCausalLM.from_config(described, attn_implementation="sdpa").to(device)
  if peer == "torch lora":
    model = _with_adapters(model, rank)
  trained = [weight for weight in model.parameters() if weight.requires_grad]
  optimizer = _optimizer(peer, model, trained, rank)
  narrow = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")

  def step() -> float:
    with narrow:
      loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()  # waits for a GPU

  return step


def _with_adapters(model, rank: int):
  """PEFT's adapters on the linear layers of the blocks; embedding, norms and head are trained whole, as in ours."""
  from peft import LoraConfig, get_peft_model

  model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LINEAR)))
  for name, weight in model.named_parameters():
    if not any(linear in name for linear in LINEAR):
      weight.requires_grad_(True)
  return model


def _optimizer(peer: str, model, trained: list, rank: int):
  import torch

  if peer in (FULL, "torch lora"):
    return torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0, fused=True)
  projected = [w for name, w in model.named_parameters() if any(linear in name for linear in LINEAR)]
  whole = [w for name, w in model.named_parameters() if not any(linear in name for linear in LINEAR)]
  common = dict(params=projected, rank=rank, update_proj_gap=GAP, proj_type="std")
  if peer == "torch galore":
    from galore_torch import GaLoreAdamW

    groups = [{"params": whole}, common | {"scale": 0.25}]
    return GaLoreAdamW(groups, lr=1e-2, weight_decay=0.0, no_deprecation_warning=True)
  from apollo_torch import APOLLOAdamW

  groups = [{"params": whole}, common | {"proj": "random", "scale_type": "channel", "scale": 1.0}]
  return APOLLOAdamW(groups, lr=1e-2, weight_decay=0.0)


if __name__ == "__main__":
  serve()
