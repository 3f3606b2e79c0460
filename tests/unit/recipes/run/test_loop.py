"""When the loop of every trainer validates and saves."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from recipes.run.loop import Schedule

counts = st.integers(1, 50)


@given(max_steps=counts, interval=counts, last=st.booleans())
def test_validations_come_at_their_interval_and_last_where_asked(max_steps, interval, last):
    schedule = Schedule("x", max_steps, val_check_interval=interval, validates_last=last)
    found = {step for step in range(1, max_steps + 1) if schedule.validates(step)}
    assert found == set(range(interval, max_steps + 1, interval)) | ({max_steps} if last else set())


@given(max_steps=counts, interval=counts)
def test_checkpoints_come_at_their_interval(max_steps, interval):
    schedule = Schedule("x", max_steps, save_interval=interval)
    found = {step for step in range(1, max_steps + 1) if schedule.saves(step)}
    assert found == set(range(interval, max_steps + 1, interval))


@given(max_steps=counts)
def test_an_interval_of_zero_is_never(max_steps):
    schedule = Schedule("x", max_steps, validates_last=True)
    assert not any(schedule.validates(step) or schedule.saves(step) for step in range(1, max_steps + 1))
