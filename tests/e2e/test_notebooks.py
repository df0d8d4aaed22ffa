"""The notebooks run from top to bottom with a small budget, and their committed outputs are complete."""

import nbformat
import pytest
from grids import tiny_base
from nbclient import NotebookClient
from paths import ROOT
from tiny import ONE_DEVICE_QUICK

FOLDER = ROOT / "experiments" / "notebooks"
STEPS = 12


def load(name):
  return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def outputs(notebook):
  return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the kernel's own packages
@pytest.mark.slow
@pytest.mark.parametrize("name", ["quickstart", "ablations"])
def test_a_notebook_runs(name, tmp_path, monkeypatch):
  for key, value in ONE_DEVICE_QUICK.items():
    monkeypatch.setenv(key, value)
  notebook = load(name)
  (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
  changes = tiny_base(tmp_path, steps=STEPS).overrides  # of a program that other tests compile as well
  parameters.source = f"STUDY = 'order'\nSTEPS = {STEPS}\nCHANGES = {changes!r}\nWORKDIR = {str(tmp_path / 'run')!r}"
  NotebookClient(notebook, timeout=900, resources={"metadata": {"path": FOLDER}}).execute()
  pictures = [output for output in outputs(notebook) if "image/png" in output.get("data", {})]
  assert len(pictures) == 2


@pytest.mark.parametrize("name", ["quickstart", "ablations"])
def test_committed_outputs_are_there_and_name_no_machine(name):
  notebook = load(name)
  code = [cell for cell in notebook.cells if cell.cell_type == "code"]
  assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
  assert not [output for output in outputs(notebook) if output.output_type == "error"]
  assert sum("image/png" in output.get("data", {}) for output in outputs(notebook)) == 2
  text = "".join(output.get("text", "") for output in outputs(notebook))
  assert "perplexity" in text and "/home/" not in text and "/tmp/" not in text
