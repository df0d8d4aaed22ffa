"""The learning-rate schedules compared with the authors' recorded ones, and the meaning of `min_lr_ratio`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_model

from switchlora_jax.errors import UserError
from switchlora_jax.methods import METHODS, full_rank_config, schedules
from switchlora_jax.methods.schedules import SCHEDULES, config_schedule, cosine_schedule


def test_cosine_schedule_is_the_recorded_one(golden, x64):
  steps = jnp.arange(101, dtype=jnp.int32)  # the dtype of the train state's step, in float64 too
  schedule = cosine_schedule(1.0, 10, 100)
  np.testing.assert_allclose(
    jax.vmap(schedule)(steps), golden("schedulers")[0]["switchlora_cosine"], rtol=0, atol=1e-12
  )


def test_the_authors_min_lr_is_a_lower_bound_on_our_cosine(golden, x64):
  """The authors bound a cosine to 0 from below by `min_lr`; our cosine ends at `final_ratio`. Both end at 0.1 here."""
  recorded = golden("schedulers")[0]["switchlora_cosine_with_min_lr"]
  steps = jnp.arange(101, dtype=jnp.int32)
  cosine = jax.vmap(cosine_schedule(1.0, 10, 100))(steps)
  np.testing.assert_allclose(jnp.where(steps < 10, cosine, jnp.maximum(cosine, 0.1)), recorded, rtol=0, atol=1e-12)
  ours = jax.vmap(cosine_schedule(1.0, 10, 100, 0.1))(steps)
  np.testing.assert_allclose(ours[-1], recorded[-1], rtol=1e-12)
  assert np.abs(ours - recorded).max() > 0.01


def test_the_first_update_has_learning_rate_0_and_the_warm_up_ends_at_the_peak():
  schedule = cosine_schedule(2e-2, 100, 1000)
  assert (float(schedule(0)), float(schedule(100))) == (0.0, pytest.approx(2e-2))


@pytest.mark.parametrize("method", METHODS)
def test_min_lr_ratio_is_the_end_of_the_cosine_for_every_method(method):
  """It is the final / peak learning rate. All methods without restarts have the same schedule."""
  config = small_model.config(method, learning_rate=0.5, min_lr_ratio=0.2, warmup_steps=10)
  schedule = METHODS[method].build(config).schedule
  expected = [0.0, 0.25, 0.5, 0.5 * (0.2 + 0.8 * 0.5), 0.5 * 0.2, 0.5 * 0.2]
  np.testing.assert_allclose([schedule(step) for step in (0, 5, 10, 55, 100, 150)], expected, rtol=1e-5)


def test_the_learning_rate_warms_up_again_after_a_warm_start():
  shape = dict(learning_rate=0.5, min_lr_ratio=0.2, warmup_steps=10)
  plain = config_schedule(small_model.config("lora", **shape))
  again = config_schedule(small_model.config("lora", **shape, warm_start_steps=40))
  np.testing.assert_allclose(
    [again(step) for step in (40, 45, 50, 70)], [0, plain(50) / 2, plain(50), plain(70)], rtol=1e-5
  )


# --- shapes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_warms_up_to_the_peak_and_ends_at_min_lr_ratio(name):
  ratio = 1.0 if name == "constant" else 0.3
  config = small_model.config("full", schedule__name=name, learning_rate=0.5, min_lr_ratio=ratio, warmup_steps=10)
  rates = [float(config_schedule(config)(step)) for step in range(151)]
  np.testing.assert_allclose([rates[0], rates[5], rates[10]], [0, 0.25, 0.5], rtol=1e-6)
  np.testing.assert_allclose([rates[100], rates[150]], 0.5 * ratio, rtol=1e-6)
  assert (np.diff(rates[10:]) <= 1e-7).all()


def test_the_shapes_between_warm_up_and_end():
  rate = lambda name, step, **changes: float(
    config_schedule(small_model.config("full", schedule__name=name, learning_rate=1.0, warmup_steps=20, **changes))(
      step
    )
  )
  assert rate("linear", 60) == pytest.approx(0.5)
  assert rate("constant", 99, min_lr_ratio=1.0) == 1.0
  assert [rate("wsd", step) for step in (79, 80, 90)] == [1.0, 1.0, pytest.approx(0.5)]
  assert rate("wsd", 50, schedule__decay_share=0.8) == pytest.approx(1 - 30 / 80)
  natural = dict(min_lr_ratio=None)
  np.testing.assert_allclose([rate("inverse_sqrt", step, **natural) for step in (20, 40, 80)], [1, 0.5**0.5, 0.5])


def test_the_default_end_is_that_of_the_schedule_where_it_has_one():
  config = lambda name: small_model.config("galore", schedule__name=name, warmup_steps=25)
  ends = {name: schedules.default_final_ratio(config(name), 0.1) for name in SCHEDULES}
  assert ends == {"cosine": 0.1, "linear": 0.1, "constant": 1.0, "wsd": 0.1, "inverse_sqrt": None}


MISTAKES = {
  "unknown": (
    dict(name="step"),
    {},
    "schedule.name (='step') must be one of cosine, linear, constant, wsd, inverse_sq",
  ),
  "falling constant": (
    dict(name="constant"),
    dict(min_lr_ratio=0.1),
    "min_lr_ratio (=0.1) must be 1 or unset, as sche",
  ),
  "no decay": (dict(name="wsd", decay_share=0.0), {}, "schedule.decay_share (=0.0) must be greater than 0"),
  "long decay": (
    dict(name="wsd", decay_share=0.9),
    {},
    "with warmup_steps (=20) of 100 steps it may be at most 0.8; set",
  ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_an_invalid_schedule_raises_an_error_with_a_remedy(name):
  keys, others, sentence = MISTAKES[name]
  config = small_model.config("full", fill=False, **dict(min_lr_ratio=None, warmup_steps=20) | others)
  config.schedule.update(keys)
  with pytest.raises(UserError) as caught:
    schedules.check(config)
  assert sentence in str(caught.value)


@pytest.mark.parametrize("name", SCHEDULES)
def test_without_warm_up_every_schedule_starts_at_the_peak(name):
  ratio = 1.0 if name == "constant" else 0.3
  config = small_model.config("full", schedule__name=name, learning_rate=0.5, min_lr_ratio=ratio, warmup_steps=0)
  schedule = config_schedule(config)
  np.testing.assert_allclose([schedule(0), schedule(1), schedule(100)], [0.5, 0.5, 0.5 * ratio], rtol=0.05)
  assert ratio == 1 or schedule(99) < 0.5


def test_a_decay_of_less_than_a_step_still_ends_at_min_lr_ratio():
  shape = dict(schedule__name="wsd", schedule__decay_share=0.004, learning_rate=1.0, min_lr_ratio=0.1, warmup_steps=0)
  schedule = config_schedule(small_model.config("full", **shape))
  np.testing.assert_allclose([schedule(99), schedule(100)], [1, 0.1], rtol=1e-6)


def test_inverse_sqrt_keeps_its_end_open_so_that_a_run_can_be_extended():
  """Its end depends on the number of steps and on the warm-up of the phase; neither is stored in the config."""
  config = lambda steps: small_model.config(
    "lora", schedule__name="inverse_sqrt", min_lr_ratio=None, steps=steps, warmup_steps=10, warm_start_warmup_steps=40,
    warm_start_steps=50,
  )  # fmt: skip
  short, long = config(100), config(200)
  assert short.min_lr_ratio is long.min_lr_ratio is None
  warm_start = full_rank_config(short)
  rate, peak = config_schedule(warm_start)(90), warm_start.learning_rate
  assert rate == pytest.approx(peak * (40 / 90) ** 0.5, rel=1e-5)
