"""Gender bias of a language model: prompts that show it, and scores that measure it."""

from megatron_ext.bias.measures import Measure, difference, interval
from megatron_ext.bias.scores import afgb_score, profession_table, pronoun_mass, ub_score

__all__ = ["Measure", "afgb_score", "difference", "interval", "profession_table", "pronoun_mass", "ub_score"]
