"""Gender bias of a language model: prompts that show it, and scores that measure it."""

from megatron_ext.bias.scores import afgb_score, bootstrap_interval, profession_table, pronoun_mass, ub_score

__all__ = ["afgb_score", "bootstrap_interval", "profession_table", "pronoun_mass", "ub_score"]
