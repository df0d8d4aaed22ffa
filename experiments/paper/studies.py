"""The ablations of Appendix B, and some the paper lacks: which values of which keys are trained side by side.

Values follow from the config's own, which is always among them, so a study fits any scale.
"""

from typing import Any, NamedTuple

from experiments.common.grid import Arm
from switchlora_jax.errors import UserError


class Study(NamedTuple):
  """One ablation: what it asks, where the paper has it, and {label: changed keys}."""

  question: str
  source: str
  lines: dict[str, dict[str, Any]]


def interval(config) -> Study:
  """Figure 6, second experiment, and never switching, which is LoRA."""
  own, shortest = config.switch.interval, 2 * config.switch.freeze_steps
  values = [value for value in (own // 4, own // 2, own, own * 2, own * 4) if value >= max(shortest, 1)]
  lines = {f"interval {value}": {"switch.interval": value} for value in values}
  return Study(
    "how often to switch", "Figure 6", lines | {"never: LoRA, at this learning rate": {"switch.interval": 0}}
  )


def ratio(config) -> Study:
  """Figure 6, first experiment: the fraction of the run at which the rate has fallen to `decay_to`."""
  values = sorted({0.03, 0.1, 0.3, 0.9, config.switch.decay_point})
  return Study("how fast switching fades", "Figure 6", {f"ratio {v:g}": {"switch.decay_point": v} for v in values})


def grid(config) -> Study:
  """Figure 7: interval and ratio together."""
  intervals = [config.switch.interval * factor for factor in (1, 2, 4)]
  ratios = sorted({0.03, 0.3, config.switch.decay_point})
  lines = {
    f"interval {i}, ratio {p:g}": {"switch.interval": i, "switch.decay_point": p} for i in intervals for p in ratios
  }
  return Study("how often, and for how long", "Figure 7", lines)


def freeze(config) -> Study:
  """Figure 8: the steps N for which a switched vector's counterpart is frozen; 0 resets without freezing."""
  values = sorted({0, 1, 2, 5, 10, 20, config.switch.freeze_steps})
  values = [value for value in values if 2 * value <= config.switch.interval]
  return Study("how long to freeze", "Figure 8", {f"N = {v}": {"switch.freeze_steps": v} for v in values})


def init(config) -> Study:
  """Figure 9: the initialisation of eq. 3 against the traditional one, of vectors and candidates."""
  del config
  lines = {"eq. 3": {"switch.init": "switchlora"}, "traditional": {"switch.init": "lora"}}
  return Study("which initialisation", "Figure 9", lines)


def rank(config) -> Study:
  """Table 5's ranks, relative to the config's."""
  values = [v for v in (config.rank // 4, config.rank // 2, config.rank, config.rank * 2) if v >= 2]
  values = [value for value in values if value < config.model.hidden_size]
  return Study("which rank", "Table 5", {f"rank {value}": {"rank": value} for value in values})


def reset(config) -> Study:
  """What resetting the counterpart's optimizer state and freezing it buy, each alone; not in the paper."""
  own = config.switch.freeze_steps
  lines = {
    f"{'reset' if reset else 'no reset'}, N = {n}": {"switch.reset": reset, "switch.freeze_steps": n}
    for reset in (True, False)
    for n in (own, 0)
  }
  return Study("whether to reset and to freeze", "App. A, eq. 11", lines)


def order(config) -> Study:
  """Section 2.2 and App. A: candidates in order or at random."""
  del config
  lines = {name: {"switch.order": name} for name in ("sequential", "random")}
  return Study("in which order candidates come", "section 2.2", lines)


STUDIES = {s.__name__: s for s in (interval, ratio, grid, freeze, init, rank, reset, order)}


def arms(name: str, config, learning_rates=()) -> list[Arm]:
  """The lines of a study of SwitchLoRA on a config.

  Raises:
    UserError: the config never switches, which leaves nothing to study.
  """
  if config.switch.interval == 0:
    raise UserError(
      "switch.interval (=0) never switches, and every study is of switching; set --config.switch.interval, say to 40"
    )
  lines = STUDIES[name](config).lines
  return [Arm(label, {"method": "switchlora"} | changed, tuple(learning_rates)) for label, changed in lines.items()]
