"""Text that is printed before and after a run."""

import math
import shlex
import sys
from pathlib import Path

import jax
import sentencepiece

from switchlora_jax.lowrank.kernel_storage import RESIDUAL
from switchlora_jax.methods import METHODS
from switchlora_jax.models.generation import Sampling, generate
from switchlora_jax.parallel import processes
from switchlora_jax.runs.directory import flatten


def parameter_count(tree) -> int:
  """Number of parameters in a tree of arrays, abstract or real; a bfloat16 kernel and its int8 residual count once."""
  leaves = jax.tree.leaves_with_path(tree)
  return sum(math.prod(leaf.shape) for path, leaf in leaves if RESIDUAL not in jax.tree_util.keystr(path[-1:]))


def bytes_of(tree) -> int:
  """Size in bytes of a tree of arrays, abstract or real."""
  return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def parameters_line(name: str, tree) -> str:
  """`trainable parameters: 609.7M (609,720,320)`, a line that scripts read."""
  count = parameter_count(tree)
  return f"{name} parameters: {count / 1e6:.1f}M ({count:,})"


def size_line(name: str, tree) -> str:
  """`optimizer: 4,652.5 MiB (4,878,450,712 bytes)`"""
  size = bytes_of(tree)
  return f"{name}: {size / 2**20:,.1f} MiB ({size:,} bytes)"


def describe_run(config, *states) -> str:
  """The resolved config, and the sizes of its train states.

  Args:
    states: the train state of each phase, abstract or real: of the full-rank warm start, if any, and of the method.
  """
  *warm_start, state = states
  lines = [f"{key}: {value}" for key, value in flatten(config).items()]
  lines += [
    "",
    parameters_line("trainable", state.params),
    parameters_line("frozen", state.frozen),
    size_line("trainable", state.params),
    size_line("frozen", state.frozen),
    size_line("candidates", state.candidates),
    size_line("optimizer", state.opt_state),
    *(size_line("optimizer in the full-rank warm start", start.opt_state) for start in warm_start),
    f"tokens per step: {config.batch_size * config.seq_len:,}",
    f"tokens in the run: {config.batch_size * config.seq_len * config.steps:,}",
  ]
  method = METHODS[config.method]
  return "\n".join(lines + method.describe(config) + [f"WARNING: {text}" for text in method.warnings(config)])


def describe_data(summary: dict) -> str:
  """Sizes of the training and validation text, and the fingerprint of the packed rows, from `Dataset.summary`."""
  lines = [f"data: {summary['source']}, fingerprint {summary['fingerprint']}"]
  for part in ("train", "valid"):
    sizes = [f"{value:,} {key}" if isinstance(value, int) else f"{key} {value}" for key, value in summary[part].items()]
    lines.append(f"  {part}: {', '.join(sizes)}")
  if "overlap" in summary:
    lines.append(f"  8-word sequences of validation that occur in training: {summary['overlap']:.2%}")
  return "\n".join(lines)


def conclude(config, workdir: Path, outcome, comparison: str | None = None) -> str:
  """Draw the loss curve, sample a text, and summarise the run. Every process must call it.

  Args:
    outcome: as from `trainer.train`.
    comparison: a line to print below the validation metrics, e.g. results of other methods for the same budget.
  """
  title = f"{workdir.name}: {config.method}, {config.steps:,} steps"
  processes.on_first_process(lambda: _plot(outcome.rows, workdir / "loss.png", title))
  lines = [
    "",
    *_validation_lines(outcome.rows),
    *([comparison] if comparison else []),
    *_training_lines(outcome.rows),
    f"updates skipped as not finite: {int(outcome.state.skipped)}",
    f"sample: {_sample_text(config, outcome)}",
    f"loss curve: {workdir / 'loss.png'}",
    f"saved in: {workdir} (config.json, metrics.jsonl, checkpoints/, tensorboard/, tokenizer.model)",
  ]
  return "\n".join(lines)


def _plot(rows: list[dict], path: Path, title: str):
  from switchlora_jax.training.plots import plot_loss  # here, so that training does not import Matplotlib

  plot_loss(rows, path, title)


def _validation_lines(rows: list[dict]) -> list[str]:
  """Perplexity and bits per byte of the last evaluation, if metrics.jsonl has one."""
  evaluations = [row for row in rows if "val_ppl" in row]
  if not evaluations:
    return []
  last = evaluations[-1]
  shown = lambda key, digits: "not finite" if last[key] is None else f"{last[key]:.{digits}f}"
  perplexity, loss = shown("val_ppl", 2), shown("val_loss", 4)
  lines = [f"validation perplexity: {perplexity} (loss {loss} nats per token, step {last['step']})"]
  if "val_bpb" in last:
    lines.append(f"validation bits per byte: {shown('val_bpb', 4)} (perplexity is per token; this compares tokenizers)")
  return lines


def _training_lines(rows: list[dict]) -> list[str]:
  """Speed and number of loss spikes, if metrics.jsonl has training steps."""
  lines = []
  if speeds := sorted(row["tokens_per_second"] for row in rows if "tokens_per_second" in row):
    lines.append(f"tokens per second: {speeds[len(speeds) // 2]:,.0f} (median)")
  if steps := [row for row in rows if "spike" in row]:  # rolled-back steps are not in metrics.jsonl
    lines.append(f"loss spikes: {sum(row['spike'] for row in steps) + steps[-1].get('rollbacks', 0)}")
  return lines


def continue_command(steps: int) -> str:
  """The command line of this process with another number of steps."""
  module = sys.modules["__main__"].__spec__
  program = f"-m {module.name}" if module else sys.argv[0]
  python = Path(sys.executable)
  python = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python
  return f"{python} {program} {shlex.join([*_without_steps(sys.argv[1:]), f'--config.steps={steps}'])}"


def _without_steps(arguments: list[str]) -> list[str]:
  """The arguments without `--config.steps=N` or `--config.steps N`."""
  starts = [i for i, word in enumerate(arguments) if word.split("=")[0] in ("--config.steps", "-config.steps")]
  dropped = {*starts, *(i + 1 for i in starts if "=" not in arguments[i])}
  return [word for i, word in enumerate(arguments) if i not in dropped]


def _sample_text(config, outcome) -> str:
  tokenizer = sentencepiece.SentencePieceProcessor(model_file=outcome.data.tokenizer_path)
  prompt = [int(token) for token in outcome.data.valid[0][:16]]
  state, new_tokens = outcome.state, min(64, config.seq_len - len(prompt))
  variables = {"params": state.params, "frozen": state.frozen}
  draws = dict(pieces=tokenizer.get_piece_size(), sampling=Sampling(temperature=0.7), seed=config.seed)
  options = dict(new_tokens=new_tokens, end=tokenizer.eos_id(), **draws)
  tokens = list(generate(outcome.phase.model, variables, prompt, **options))
  return f"{tokenizer.decode(prompt)!r} → {tokenizer.decode(tokens)!r}"
