"""Which form of plan to run: a call per level of the tree, or one call over copied keys.

Copying reads and writes every shared key once for each document below it; merging reads and writes results once for each
query row and level. The first pays while the shared keys are few, and the fewer key/value heads the longer.
"""

from __future__ import annotations

import logging
from functools import cache, lru_cache

from megatron_ext.attention.plan import Plan, binding, documents, plan_attention
from megatron_ext.errors import UserError
from megatron_ext.grouping import PrefixGroups

__all__ = ["ATTENTION_PLANS", "choose_plan"]

logger = logging.getLogger(__name__)

ATTENTION_PLANS = ("auto", "levels", "one_call")
# Copied rows per document, times key/value heads over query heads, up to which one call is the faster form. Measured on
# two CPU threads (tools/bench_attention_forms.py, docs/benchmarks.md). Not measured on a GPU, so never chosen there.
MOST_COPIED_ROWS = {"cpu": 8.0}


def choose_plan(
    groups: PrefixGroups,
    window: int | None,
    num_heads: int,
    num_key_heads: int,
    device_type: str,
    attention_plan: str = "auto",
) -> Plan:
    """The plan of a stream, its form by the measured rule unless `attention_plan` names one. Windows have one form only.

    Raises:
        UserError: an unknown form, or "levels" for a window that hides something.
    """
    if attention_plan not in ATTENTION_PLANS:
        raise UserError(f"unknown attention_plan {attention_plan!r}: choose one of {', '.join(ATTENTION_PLANS)}")
    slides = binding(window, documents(groups.trees), groups.num_pad_tokens) is not None
    if slides and attention_plan == "levels":
        raise UserError(f"a sliding window of {window} rows has no plan of levels: use attention_plan='auto'")
    if attention_plan == "auto":
        rows = _copied_rows_per_document(groups.trees) * num_key_heads / num_heads
        one_call = slides or 0 < rows <= MOST_COPIED_ROWS.get(device_type, 0)
        _log_form(one_call, "its window slides" if slides else "prefixes are short" if one_call else "")
    else:
        one_call = attention_plan == "one_call"
    return plan_attention(groups, window, one_call)


@lru_cache(maxsize=64)
def _copied_rows_per_document(trees) -> float:
    """Mean of the rows that a document sees before itself, over those that see any."""
    seen = [d.position for d in documents(trees) if d.ancestors]
    return sum(seen) / len(seen) if seen else 0.0


@cache
def _log_form(one_call: bool, reason: str) -> None:
    if one_call:
        logger.info("attention runs in one call over copied keys, because %s", reason)
    else:
        logger.info("attention runs in a call per level of its prefix tree; shared keys are not copied")
