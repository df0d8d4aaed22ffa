"""Ablations of SwitchLoRA: those of Appendix B of the paper, and further ones.

The values of a study are derived from the config's own setting and always include it, so a study fits any scale.
"""

from typing import Any, NamedTuple

from experiments.common.trials import Variant
from switchlora_jax.errors import UserError
from switchlora_jax.lowrank.layers import CANDIDATES
from switchlora_jax.methods.switchlora import DECAYS, SLOTS, STATES, TRANSPORT
from switchlora_jax.models.architecture import smaller_sides


class Study(NamedTuple):
  """One ablation.

  Attributes:
    question: its subject. source: its place in the paper.
    lines: {label: changed config keys}.
  """

  question: str
  source: str
  lines: dict[str, dict[str, Any]]


def interval(config) -> Study:
  """Figure 6, second experiment: the switch interval; without switching the method is LoRA."""
  own, shortest = config.switch.interval, 2 * config.switch.freeze_steps
  values = [value for value in (own // 4, own // 2, own, own * 2, own * 4) if value >= max(shortest, 1)]
  lines = {f"interval {value}": {"switch.interval": value} for value in values}
  return Study(
    "how often to switch", "Figure 6", lines | {"never: LoRA, at this learning rate": {"switch.interval": 0}}
  )


def ratio(config) -> Study:
  """Figure 6, first experiment: the fraction of the run at which the switching rate has decayed to `decay_to`."""
  values = sorted({0.03, 0.1, 0.3, 0.9, config.switch.decay_point})
  return Study("how fast switching fades", "Figure 6", {f"ratio {v:g}": {"switch.decay_point": v} for v in values})


def grid(config) -> Study:
  """Figure 7: interval and ratio combined."""
  intervals = [config.switch.interval * factor for factor in (1, 2, 4)]
  ratios = sorted({0.03, 0.3, config.switch.decay_point})
  lines = {
    f"interval {i}, ratio {p:g}": {"switch.interval": i, "switch.decay_point": p} for i in intervals for p in ratios
  }
  return Study("how often, and for how long", "Figure 7", lines)


def freeze(config) -> Study:
  """Figure 8: number of steps N for which a switched vector's counterpart is frozen; 0: only reset."""
  values = sorted({0, 1, 2, 5, 10, 20, config.switch.freeze_steps})
  values = [value for value in values if 2 * value <= config.switch.interval]
  return Study("how long to freeze", "Figure 8", {f"N = {v}": {"switch.freeze_steps": v} for v in values})


def init(config) -> Study:
  """Figure 9: initialisation of vectors and candidates by eq. 3 or as in LoRA."""
  del config
  lines = {"eq. 3": {"switch.init": "switchlora"}, "traditional": {"switch.init": "lora"}}
  return Study("which initialisation", "Figure 9", lines)


def rank(config) -> Study:
  """The ranks of Table 5, relative to the config's."""
  values = [v for v in (config.rank // 4, config.rank // 2, config.rank, config.rank * 2) if v >= 2]
  values = [value for value in values if value < max(smaller_sides(config.model).values())]
  return Study("which rank", "Table 5", {f"rank {value}": {"rank": value} for value in values})


def state(config) -> Study:
  """What becomes of the counterpart's optimizer state, with and without freezing it; not in the paper."""
  own = config.switch.freeze_steps
  states = [state for state in STATES if (state, config.switch.init) != (TRANSPORT, "lora")]
  lines = {f"{state}, N = {n}": {"switch.state": state, "switch.freeze_steps": n} for state in states for n in (own, 0)}
  return Study("what becomes of Adam's state, and whether to freeze", "App. A, eq. 11", lines)


def decay(config) -> Study:
  """When switching starts and how its rate falls; not in the paper, which decays exponentially from the first step."""
  first = config.warm_start_steps
  starts = sorted({first, first + config.warmup_steps, max(first, config.switch.start)})
  lines = {
    f"from step {start}, {kind.replace('_', ' ')}": {"switch.start": start, "switch.decay": kind}
    for kind in DECAYS
    for start in starts
  }
  return Study("when switching starts, and how it falls", "Algorithm 2, lines 5 and 10", lines)


def slots(config) -> Study:
  """Which vectors are switched; not in the paper, which takes one after the other."""
  del config
  lines = {name: {"switch.slots": name} for name in SLOTS}
  return Study("which vectors are switched", "section 5", lines)


def candidates(config) -> Study:
  """Stored candidates, which come back, or fresh random vectors; not in the paper."""
  del config
  return Study(
    "whether evicted vectors are kept", "section 2.2", {kind: {"switch.candidates": kind} for kind in CANDIDATES}
  )


def order(config) -> Study:
  """Section 2.2 and App. A: candidates selected sequentially or at random."""
  del config
  lines = {name: {"switch.order": name} for name in ("sequential", "random")}
  return Study("in which order candidates come", "section 2.2", lines)


STUDIES = {s.__name__: s for s in (interval, ratio, grid, freeze, init, rank, state, decay, slots, candidates, order)}


def study_variants(name: str, config, learning_rates=()) -> list[Variant]:
  """The variants of a study of SwitchLoRA, each with the given learning rates.

  Raises:
    UserError: the config disables switching, so all variants would be equal.
  """
  if config.switch.interval == 0:
    raise UserError(
      "switch.interval (=0) disables switching, the subject of every study; set --config.switch.interval, e.g. to 40"
    )
  lines = STUDIES[name](config).lines
  return [Variant(label, {"method": "switchlora"} | changed, tuple(learning_rates)) for label, changed in lines.items()]
