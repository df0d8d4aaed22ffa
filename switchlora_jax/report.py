"""What is printed before and after a run."""

import math
import sys
from pathlib import Path

import jax
import sentencepiece

from switchlora_jax import metrics
from switchlora_jax.config import flatten
from switchlora_jax.methods import switchlora
from switchlora_jax.sampling import sample
from switchlora_jax.switching import expected_cycles


def parameters_line(name: str, tree) -> str:
  """`trainable parameters: 609.7M (609,720,320)`, which scripts read."""
  count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
  return f"{name} parameters: {count / 1e6:.1f}M ({count:,})"


def size_line(name: str, tree) -> str:
  """`optimizer: 4.54 GiB (4,877,…  bytes)`"""
  size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
  return f"{name}: {size / 2**20:,.1f} MiB ({size:,} bytes)"


def describe(config, state) -> str:
  """The resolved config and the sizes of a state, abstract or real."""
  lines = [f"{key}: {value}" for key, value in flatten(config).items()]
  lines += [
    "",
    parameters_line("trainable", state.params),
    parameters_line("frozen", state.frozen),
    size_line("trainable", state.params),
    size_line("frozen", state.frozen),
    size_line("candidates", state.candidates),
    size_line("optimizer", state.opt_state),
    f"tokens per step: {config.batch_size * config.seq_len:,}",
    f"tokens in the run: {config.batch_size * config.seq_len * config.steps:,}",
  ]
  if config.method == "switchlora" and config.switch.interval:
    cycles = expected_cycles(switchlora.schedule(config), config.rank, config.model.hidden_size)
    lines.append(f"candidates cycled over the run, hidden × hidden layers: {cycles:.2f} times")
  return "\n".join(lines)


def describe_data(summary: dict) -> str:
  """The size of training and validation text, and the fingerprint of the rows."""
  lines = [f"data: {summary['source']}, fingerprint {summary['fingerprint']}"]
  for part in ("train", "valid"):
    sizes = [f"{value:,} {key}" if isinstance(value, int) else f"{key} {value}" for key, value in summary[part].items()]
    lines.append(f"  {part}: {', '.join(sizes)}")
  if "overlap" in summary:
    lines.append(f"  8-word sequences of validation that occur in training: {summary['overlap']:.2%}")
  return "\n".join(lines)


def conclude(config, workdir: Path, outcome) -> str:
  """Draw loss.png, sample a text, and say how the run went, where it lies and how it goes on."""
  rows = outcome.rows
  title = f"{config.method}, rank {config.rank}" if config.method != "full" else "full rank"
  metrics.plot_loss(rows, workdir / "loss.png", f"{title}, {config.steps:,} steps")
  last = [row for row in rows if "val_ppl" in row][-1]
  speeds = sorted(row["tokens_per_second"] for row in rows if "tokens_per_second" in row)
  skipped = max(row.get("skipped", 0) for row in rows)
  lines = [
    "",
    f"validation perplexity: {last['val_ppl']:.2f} (loss {last['val_loss']:.4f} nats per token, step {last['step']})",
    f"tokens per second: {speeds[len(speeds) // 2]:,.0f} (median)",
    f"updates skipped as not finite: {skipped}",
    f"sample: {_sample_text(config, workdir, outcome)}",
    f"loss curve: {workdir / 'loss.png'}",
    f"saved in: {workdir} (config.json, metrics.jsonl, checkpoints/, tensorboard/, tokenizer.model)",
    f"continue for twice as long: {continue_command(config.steps * 2)}",
  ]
  return "\n".join(lines)


def continue_command(steps: int) -> str:
  """The command line this process was started with, with another number of steps."""
  module = sys.modules["__main__"].__spec__
  kept = [arg for arg in sys.argv[1:] if not arg.startswith("--config.steps")]
  program = f"-m {module.name}" if module else sys.argv[0]
  return " ".join([Path(sys.executable).name, program, *kept, f"--config.steps={steps}"])


def _sample_text(config, workdir: Path, outcome) -> str:
  tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(workdir / "tokenizer.model"))
  prompt = [int(token) for token in outcome.data.valid[0][:16]]
  state, new_tokens = outcome.state, min(64, config.seq_len - len(prompt))
  tokens = sample(
    outcome.program.model, state.params, state.frozen, prompt, new_tokens=new_tokens, temperature=0.7, seed=config.seed
  )
  return f"{tokenizer.decode(prompt)!r} → {tokenizer.decode(tokens[len(prompt) :])!r}"
