"""Steps of PyTorch's libraries in their own process: the protocol here, and the steps where the libraries are found."""

import importlib.util
import math
import sys

import pytest

from experiments.common import torch_peers
from switchlora_jax.errors import UserError
from switchlora_jax.interop.families import hugging_face_config

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=2, max_position=16)
ROWS = [[(7 * row + 3 * at) % 64 for at in range(16)] for row in range(2)]
SETTING = dict(model=hugging_face_config(SIZES), rows=ROWS, dtype="float32", clip_norm=1.0)
ECHO = """
import itertools, sys
from experiments.common import torch_peers

def make_step(peer, rank, **setting):
  print("a library greets")
  steps = itertools.count(rank)
  if peer == "torch apollo":
    sys.exit(3)
  return lambda: [next(steps), setting["model"]["num_hidden_layers"]]

torch_peers.make_step = make_step
torch_peers.serve()
"""


def test_each_peer_is_made_once_and_what_libraries_print_is_no_answer(monkeypatch, capfd):
  monkeypatch.setattr(torch_peers, "COMMAND", (sys.executable, "-c", ECHO))
  with torch_peers.Peers(**SETTING) as peers:
    steps = [peers.step(*which) for which in (("torch full", 0), ("torch lora", 4), ("torch full", 0))]
    with pytest.raises(UserError, match="the process of torch apollo ended with exit code 3; its last lines above"):
      peers.step("torch apollo", 4)
    with pytest.raises(UserError, match="exit code 3"):
      peers.step("torch full", 0)
  assert steps == [[0, 1], [4, 1], [1, 1]]
  assert capfd.readouterr().err.count("a library greets") == 3


def test_what_is_not_installed_is_named(monkeypatch):
  found = {"torch": "2.13.0", "transformers": "5.23.0", "galore-torch": "1.0"}
  monkeypatch.setattr(torch_peers, "_version", lambda package: found.get(package, ""))
  assert torch_peers.installed() == {"torch full": "transformers 5.23.0", "torch galore": "galore-torch 1.0"}
  del found["torch"]
  with pytest.raises(UserError, match=r"--peers=torch needs torch, .*install requirements-torch\.txt"):
    torch_peers.installed()


@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="needs requirements-torch.txt")
def test_each_installed_peer_learns():
  with torch_peers.Peers(**SETTING) as peers:
    for peer in torch_peers.installed():
      first, *_, last = (peers.step(peer, 4) for _ in range(6))
      assert first == pytest.approx(math.log(64), rel=0.1) and last < first - 0.01
