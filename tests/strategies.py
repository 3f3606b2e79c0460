"""Any lengths of streams, for properties (hypothesis)."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.layouts import documents

__all__ = ["lengths_strategy", "nested_strategy"]

# Any lengths with at least one token.
lengths_strategy = st.lists(
    st.tuples(st.integers(0, 7), st.lists(st.integers(0, 5), max_size=4)), min_size=1, max_size=4
).filter(lambda lengths: sum(p + sum(s) for p, s in lengths) > 0)


# Any trees of up to four levels below the prompt.
nested_strategy = st.lists(
    st.tuples(
        st.integers(0, 6),
        st.lists(
            st.recursive(
                st.integers(0, 4), lambda inner: st.tuples(st.integers(0, 4), st.lists(inner, max_size=3)), max_leaves=5
            ),
            max_size=3,
        ),
    ),
    min_size=1,
    max_size=3,
).filter(lambda forest: bool(sum(len(d) for d, _ in documents(forest))))
