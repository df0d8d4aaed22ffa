"""Text that is printed before and after a run."""

import itertools
import math
import shlex
import sys
from pathlib import Path

import jax
import numpy as np

from switchlora_jax.data.tokenizer import load_tokenizer
from switchlora_jax.lowrank.kernel_storage import RESIDUAL, SCALE
from switchlora_jax.methods import METHODS, optimizers
from switchlora_jax.models.generation import Sampling, generate
from switchlora_jax.parallel import processes
from switchlora_jax.runs.directory import flatten
from switchlora_jax.runs.tokenizer_files import tokenizer_in
from switchlora_jax.training.evaluation import describe_perplexities, further

LARGE_ERROR = 0.05  # standard error of a perplexity, relative to it, that is reported
PROMPT_ROWS = 100  # validation rows that are searched for the start of a document


def parameter_count(tree) -> int:
  """Number of parameters in a tree of arrays, abstract or real; a kernel with its scale and residual counts once."""
  leaves = jax.tree.leaves_with_path(tree)
  name = lambda path: jax.tree_util.keystr(path[-1:], simple=True)
  return sum(math.prod(leaf.shape) for path, leaf in leaves if name(path) not in (RESIDUAL, SCALE))


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


def describe_changes(config, defaults) -> str:
  """A table of the config keys whose values are not the defaults.

  Args:
    config: a config, resolved or not.
    defaults: the config of configs/base.py.
  """
  now, then = flatten(config), flatten(defaults)
  changed = [key for key in now if key not in then or now[key] != then[key]]
  if not changed:
    return "config: the defaults of configs/base.py"
  width = max(map(len, changed))
  rows = [f"  {key:<{width}}  {now[key]!r} (default {then.get(key)!r})" for key in changed]
  return "\n".join(["config, where it differs from configs/base.py (config.json has all keys):", *rows])


def describe_run(config, *states) -> str:
  """The settings that depend on method and devices, and the sizes of the train states of a resolved config.

  Args:
    states: the train state of each phase, abstract or real: of the full-rank warm start, if any, and of the method.
  """
  *warm_start, state = states
  most, but_padding = ("at most ", ", padding included") if config.data.packing == "pad" else ("", "")
  lines = [
    f"learning_rate: {config.learning_rate}",
    f"rest_learning_rate: {config.rest_learning_rate}",
    f"dtype: {config.dtype}",
    parameters_line("trainable", state.params),
    parameters_line("frozen", state.frozen),
    size_line("trainable", state.params),
    size_line("frozen", state.frozen),
    size_line("candidates", state.candidates),
    size_line("optimizer", state.opt_state),
    *(size_line("optimizer in the full-rank warm start", start.opt_state) for start in warm_start),
    f"tokens per step: {most}{config.batch_size * config.seq_len:,}{but_padding}",
    f"tokens in the run: {most}{config.batch_size * config.seq_len * config.steps:,}{but_padding}",
  ]
  return "\n".join(lines + METHODS[config.method].describe(config) + describe_warnings(config))


def describe_warnings(config) -> list[str]:
  """The warnings of the method and the optimizer of a config, one line each."""
  texts = METHODS[config.method].warnings(config) + optimizers.warnings(config)
  return [f"WARNING: {text}" for text in texts]


def describe_data(summary: dict) -> str:
  """Sizes of the training and validation text, and the fingerprint of the packed rows, from `Dataset.summary`."""
  lines = [f"data: {summary['source']}, fingerprint {summary['fingerprint']}"]
  for part, found in ({part: summary[part] for part in ("train", "valid")} | summary.get("further", {})).items():
    sizes = [f"{value:,} {key}" if isinstance(value, int) else f"{key} {value}" for key, value in found.items()]
    lines.append(f"  {part}: {', '.join(sizes)}")
  if "overlap" in summary:
    lines.append(f"  8-word sequences of validation that occur in training: {summary['overlap']:.2%}")
  return "\n".join(lines)


def conclude(config, workdir: Path, outcome, comparison: str | None = None, start_seconds: float | None = None) -> str:
  """Draw the loss curve, sample a text, and summarise the run. Every process must call it.

  Args:
    outcome: as from `trainer.train`.
    comparison: a line to print below the validation metrics, e.g. results of other methods for the same budget.
    start_seconds: from the start of the command to the end of its first step; None: not printed.
  """
  title = f"{workdir.name}: {config.method}, {config.steps:,} steps"
  processes.on_first_process(lambda: _plot(outcome.rows, workdir / "loss.png", title))
  started = f"seconds from the start of the command to the end of its first step: {start_seconds or 0:.1f}"
  lines = [
    "",
    *_validation_lines(outcome.rows),
    *([comparison] if comparison else []),
    *_training_lines(outcome.rows),
    *_padding_lines(outcome),
    *([started] if start_seconds is not None else []),
    f"updates skipped as not finite: {int(outcome.state.skipped)}",
    f"sample: {_sample_text(config, outcome)}",
    f"loss curve: {workdir / 'loss.png'}",
    f"saved in: {workdir} (config.json, metrics.jsonl, checkpoints/, tensorboard/, {tokenizer_in(workdir).name})",
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
  if evaluations[0]["step"] == 0 or further(last):
    shown_rows = evaluations if len(evaluations) < 2 else (evaluations[0], last)
    lines += [f"step {row['step']}: {describe_perplexities(row)}" for row in shown_rows]
  error, value = last.get("val_ppl_se", 0), last["val_ppl"]
  if value is not None and (error is None or error > LARGE_ERROR * value):
    lines.append(
      f"WARNING: few validation rows; the standard error of the perplexity is {shown('val_ppl_se', 2)}; set "
      "--config.data.eval_path to more text, or raise --config.eval_tokens"
    )
  return lines


def _training_lines(rows: list[dict]) -> list[str]:
  """Hand-over of a warm start, speed and number of loss spikes, if metrics.jsonl has training steps."""
  lines = []
  steps = [row for row in rows if "loss" in row]
  for before, after in itertools.pairwise(steps):
    if after.get("hand_over"):
      shown = [f"{row['loss']:.4f}" if row["loss"] is not None else "not finite" for row in (before, after)]
      lines.append(f"hand-over of the warm start after step {before['step']}: loss {' before, '.join(shown)} after")
  if speeds := sorted(row["tokens_per_second"] for row in rows if "tokens_per_second" in row):
    lines.append(f"tokens per second: {speeds[len(speeds) // 2]:,.0f} (median)")
  if utilisations := sorted(row["mfu"] for row in rows if row.get("mfu")):
    lines.append(f"model FLOPs utilisation: {utilisations[len(utilisations) // 2]:.1%} (median)")
  if peaks := [row["peak_memory_bytes"] for row in rows if "peak_memory_bytes" in row]:
    lines.append(f"peak memory: {max(peaks) / 2**20:,.0f} MiB")
  if steps := [row for row in rows if "spike" in row]:  # rolled-back steps are not in metrics.jsonl
    lines.append(f"loss spikes: {sum(row['spike'] for row in steps) + steps[-1].get('rollbacks', 0)}")
  return lines


def _padding_lines(outcome) -> list[str]:
  """The tokens that a run with padding trained on, and those that a stream has cut off."""
  steps = [row for row in outcome.rows if "padding_share" in row]
  if not steps:
    return []
  tokens, share = sum(row["tokens"] for row in steps), sum(row["padding_share"] for row in steps) / len(steps)
  lines = [f"tokens trained on: {tokens:,}, without padding, which was {share:.1%} of the rows"]
  cut = getattr(outcome.data.train, "cut_tokens", None)  # of a prepared text it is printed with the sizes of the data
  return lines + ([f"tokens cut off from the text read: {cut:,}"] if cut is not None else [])


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
  tokenizer = load_tokenizer(outcome.data.tokenizer_path)
  held_out = "held out of" in outcome.data.summary["valid"]
  starts = not held_out or config.data.packing == "pad"
  prompt = sample_prompt(outcome.data.valid, tokenizer, min(16, config.seq_len // 2), starts)
  state, new_tokens = outcome.state, min(64, config.seq_len - len(prompt))
  variables = {"params": state.params, "frozen": state.frozen}
  draws = dict(pieces=tokenizer.size, sampling=Sampling(temperature=0.7), seed=config.seed)
  options = dict(new_tokens=new_tokens, end=tokenizer.eos, **draws)
  tokens = list(generate(outcome.phase.model, variables, prompt, **options))
  return f"{tokenizer.decode(prompt).lstrip()!r} → {tokenizer.decode(tokens)!r}"


def sample_prompt(rows, tokenizer, length: int, starts: bool) -> list[int]:
  """Up to `length` tokens from the start of a document, or of a word if none of the first rows has such a document.

  Args:
    rows: [n, seq_len], packed sequences.
    starts: whether a document begins with the first row.
  """
  end, rows = tokenizer.eos, np.asarray(rows[np.arange(min(len(rows), PROMPT_ROWS))])
  if starts:
    return _first_document(rows[0, :length], end)
  documents = [row[at + 1 : at + 1 + length] for row in rows for at in np.flatnonzero(row == end)]
  if whole := [tokens for tokens in documents if len(tokens) == length and end not in tokens]:
    return whole[0].tolist()
  words = [at for at, token in enumerate(rows[0].tolist()) if tokenizer.token_bytes(token).startswith(b" ")]
  first = words[0] if words else np.argmax(rows[0] != end)
  return _first_document(rows[0, first : first + length], end)


def _first_document(tokens: np.ndarray, end: int) -> list[int]:
  """The tokens before the first `end`."""
  return list(itertools.takewhile(lambda token: token != end, tokens.tolist()))
