"""The numbers of a report: curves that are thinned, axes, and how values are written."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from tools.reporting.numbers import axis, drawable, key_steps, spread_out, written
from tools.reporting.words import exact

values = st.dictionaries(st.integers(0, 400), st.floats(), min_size=1)


@given(st.lists(values, min_size=1, max_size=4), st.integers(16, 60))
def test_no_peak_is_lost(series, limit):
    kept = key_steps(series, limit)
    assert kept == sorted(set(kept)) and set(kept) <= set().union(*series)
    assert len(kept) <= limit or len(set().union(*series)) <= limit
    for curve in series:
        finite = [x for x in curve.values() if drawable(x)]
        shown = [curve[step] for step in kept if step in curve and drawable(curve[step])]
        assert not finite or (min(shown), max(shown)) == (min(finite), max(finite))
        assert any(not drawable(curve.get(s, 0.0)) for s in kept) or len(finite) == len(curve)


@given(st.lists(st.floats(), min_size=1), st.booleans())
def test_an_axis_holds_its_values(found, may_be_log):
    scale = axis(found, may_be_log=may_be_log)
    assert all(-1e-9 <= scale.place(x) <= 1 + 1e-9 for x in found if drawable(x))
    assert scale.ticks == sorted(set(scale.ticks)) and all(-1e-9 <= scale.place(x) <= 1 + 1e-9 for x in scale.ticks)


@given(st.integers(1, 300), st.integers(1, 40))
def test_what_is_spread_out_has_its_ends(count, limit):
    found = spread_out(range(count), limit)
    assert len(found) == min(count, limit) == len(set(found)) and found[-1] == count - 1
    assert found[0] == 0 or limit == 1


@given(st.floats(-1e300, 1e300))
def test_numbers_are_written_as_they_are(value):
    assert float(exact(value)) == value
    assert math.isclose(float(written(value).replace(",", "")), value, rel_tol=5.1e-5)
