"""Pre-train a decoder of the LLaMA family. The same command with the same --workdir continues a run that was stopped.

python -m experiments.pretrain --config=configs/llama_tiny.py --workdir=runs/tiny
python -m experiments.pretrain --config=configs/llama_350m.py --config.rank=128 --dry_run
python -m experiments.pretrain --workdir=runs/continued --config.warm_start_from=llama3 --config.method=lora
Several processes train together when SLURM starts them, or with --coordinator, --num_processes and --process_id;
see docs/cluster.md.
Exit codes: 2, a user error; 75, stopped by SIGTERM or Ctrl-C after saving; 69, hung or lost another process.
"""

import time
from pathlib import Path

import jax
from absl import flags

from configs import base, llama_tiny
from experiments.common import cli, distributed
from switchlora_jax.config import resolve
from switchlora_jax.errors import UserError
from switchlora_jax.parallel import processes
from switchlora_jax.parallel.sharding import make_mesh
from switchlora_jax.planning import topology
from switchlora_jax.runs import directory as run_directory
from switchlora_jax.runs.directory import flatten
from switchlora_jax.training import report, throughput, trainer, warm_start
from switchlora_jax.training.phases import build_phases

CONFIG = cli.define_config()
flags.declare_key_flag("config")  # shown by --help
WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run: created, or continued if it holds one")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "print the settings and all sizes, allocate nothing, and exit")
cli.define_quiet()
distributed.define_flags()
flags.adopt_module_key_flags(distributed)


def main():
  """Check the config, then print its sizes (--dry_run), or train and print the report."""
  distributed.initialize()
  config, workdir, adopted = processes.on_all_processes(check)
  processes.check_same(what_must_agree(config, workdir))
  cli.set_precision(config)
  if adopted and not flags.FLAGS.quiet:
    processes.print_once(adopted)
  changes = report.describe_changes(CONFIG.value, base.get_config())
  if DRY_RUN.value:
    phases = build_phases(config, make_mesh(fsdp=config.sharding.fsdp))
    sizes = report.describe_run(config, *(phase.abstract for phase in phases))
    processes.print_once(f"{changes}\n{sizes}")
    return
  peak_flops = topology.peak_flops(jax.devices()[0].device_kind, config.dtype)
  options = dict(heading=changes, quiet=flags.FLAGS.quiet, peak_flops=peak_flops)
  outcome = trainer.train(config, workdir, flags.FLAGS.peer_timeout, distributed.end_process, **options)
  processes.print_once(report.conclude(config, workdir, outcome, comparison(config), start_seconds(outcome)))
  processes.print_once(f"continue for twice as long: {report.continue_command(config.steps * 2)}")


def start_seconds(outcome) -> float | None:
  """Seconds from the start of this process to the end of its first step; None if it did no step."""
  if outcome.first_step_at is None:
    return None
  return throughput.seconds_since_start() - (time.monotonic() - outcome.first_step_at)


def check():
  """Before anything expensive: the resolved config, the directory of the run, and the keys that a warm start set.

  The directory is None in a dry run. The keys are one line to print, or None.
  """
  workdir = None if DRY_RUN.value or WORKDIR.value is None else Path(WORKDIR.value).expanduser()
  adopted = warm_start.adopt_architecture(CONFIG.value, cli.given_keys(CONFIG.value), workdir)
  config = resolve(CONFIG.value, jax.device_count(), jax.default_backend())
  if workdir is None and not DRY_RUN.value:
    raise UserError("--workdir is missing: give the directory of the run, for example --workdir=runs/tiny")
  return config, workdir, adopted


def comparison(config) -> str | None:
  """Perplexities of other methods at the budget of the default run; None for another run."""
  default = resolve(llama_tiny.get_config(), jax.device_count(), jax.default_backend())
  if run_directory.differences(default.to_dict(), config.to_dict()):
    return None
  measured = ", ".join(
    f"{name} {perplexity:.2f} ({bits:.3f} bits per byte)" for name, (perplexity, bits) in llama_tiny.REFERENCE.items()
  )
  return f"at this budget with both learning rates swept, mean of 3 seeds: {measured}; see docs/results/index.md"


def what_must_agree(config, workdir: Path | None) -> dict:
  """{setting: value} that must be equal on all processes of a run: everything except `data.cache_dir`."""
  keys = {key: value for key, value in flatten(config).items() if key != "data.cache_dir"}
  command = {"--workdir": workdir and str(workdir.absolute()), "--dry_run": DRY_RUN.value}
  return keys | command | run_directory.versions() | {"git revision": run_directory.git_revision()}


if __name__ == "__main__":
  cli.run(main, continues=True)
