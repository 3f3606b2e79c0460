"""What figures are called in reports."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["titles"]


def titles(result: Mapping, words: tuple[str, str]) -> dict[str, str]:
    """Of the figures and counts that there are, by their keys, in the order of a report."""
    first, second = words
    known = {
        "afgb": "AFGB (0 is fair)",
        "ub": "UB (1 follows every hint)",
        "pronoun_mass": f"mean P({first}) + P({second})",
        "hinted_pronoun_mass": "the same on hinted prompts",
        "share_preferring_first": f"share of prompts preferring {first!r}",
        "others_mass": "mean probability of all other words together",
        "others_by_word": "the same by word",
        "others_preferred": "share of prompts whose likeliest word is another",
        "perplexity": "perplexity of neutral text",
        **_crows_pairs(result),
        **_SETS,
    }
    return {key: title for key, title in known.items() if result.get(key) is not None}


def _crows_pairs(result: Mapping) -> dict[str, str]:
    """Of each bias type that was asked about; gender's keys name no type."""
    found = {}
    for key in (key for key in result if key.startswith("crows_pairs") and key.endswith("_stereotype_share")):
        name = key.removesuffix("_stereotype_share")
        bias_type = name.removeprefix("crows_pairs").removeprefix("_") or "gender"
        of = "CrowS-Pairs" if bias_type == "gender" else f"CrowS-Pairs, {bias_type}"
        found[key] = f"{of}: share preferring the stereotype (ideal 0.5)"
        found[f"{name}_likelihood_difference"] = f"{of}: mean difference of log-likelihoods (0 is fair)"
        found[name] = f"CrowS-Pairs: pairs of bias type {bias_type}"
    return found


_SETS = {
    "winobias_stereotype_share": "WinoBias: share preferring the stereotype (ideal 0.5)",
    "winobias_pro_accuracy": "WinoBias: accuracy of whom a pronoun stands for, with the stereotype",
    "winobias_anti_accuracy": "WinoBias: the same, against it",
    "winobias_accuracy_gap": "WinoBias: the one less the other (0 is fair)",
    "winobias_asked": "WinoBias: pairs of two known occupations, asked for accuracy",
    "winobias_pairs": "WinoBias: pairs",
    "winobias_dropped": "WinoBias: pairs left out, which differ in more than pronouns",
    "winogender_accuracy": "Winogender: accuracy",
    "winogender_accuracy_by_gender": "Winogender: accuracy by pronoun",
    "winogender_accuracy_by_difficulty": "Winogender: accuracy where statistics speak against the answer (gotcha), and for it",
    "winogender_correlation": "Winogender: correlation of preferring a woman with women's share (0 is fair)",
    "winogender_questions": "Winogender: questions",
    "bbq_ambiguous_accuracy": "BBQ: accuracy where it is not known who (1 is best)",
    "bbq_ambiguous_accuracy_by_category": "BBQ: the same by category",
    "bbq_ambiguous_bias": "BBQ: bias score where it is not known who (0 is fair)",
    "bbq_ambiguous_bias_by_category": "BBQ: the same by category",
    "bbq_disambiguated_accuracy": "BBQ: accuracy where the context says who (1 is best)",
    "bbq_disambiguated_accuracy_by_category": "BBQ: the same by category",
    "bbq_disambiguated_bias": "BBQ: bias score where the context says who (0 is fair)",
    "bbq_disambiguated_bias_by_category": "BBQ: the same by category",
    "bbq_questions": "BBQ: questions",
    **{
        f"stereoset{kind}_{score}{by}": f"StereoSet{said}: {title}{', by type of bias' if by else ''}"
        for kind, said in (("", ""), ("_intrasentence", ", within sentences"), ("_intersentence", ", behind sentences"))
        for score, title in (
            ("lm", "LM score (100 is best)"),
            ("ss", "SS score (50 is fair)"),
            ("icat", "ICAT (100 is best)"),
        )
        for by in ("", "_by_type")
    },
    "stereoset_triples": "StereoSet: triples",
    "cooccurrence_difference": "co-occurrence: log P(female, woman) - log P(male, man) (0 is fair)",
    "cooccurrence_male_preferred": "co-occurrence: share whose likeliest word is male (ideal 0.5)",
    "cooccurrence_sentences": "co-occurrence: sentences",
    "discrim_eval": "discrim-eval: difference of log-odds of a yes (0 is fair)",
    "discrim_eval_questions": "discrim-eval: questions",
    "discrim_eval_dropped": "discrim-eval: rows left out, which do not say race, gender and age",
}
