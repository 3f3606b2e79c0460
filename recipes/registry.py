"""The recipes by name: what launching, submitting, planning and the documentation know of each.

    python3 recipes/registry.py resumes train_sft      # yes or no, for job scripts

Any python3 runs this file, with the standard library alone: classes are imported when they are asked for.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass

__all__ = ["RECIPES", "Recipe"]


@dataclass(frozen=True)
class Recipe:
    """An entry script of recipes/.

    Attributes:
        config: its configuration class, as "module:Class".
        default: the file of nemo_configs/ that it takes where the command line names none.
        section: the section of `trainer` that is its own; None: it has none.
        resumes: whether exp_manager.resume_if_exists=true goes on after a stop; else it starts anew, in a new folder.
        planned: whether the planner knows its step.
        asks_reward: whether it asks a reward, which a server may give.
        samples: whether it samples responses, which vLLM servers may.
    """

    config: str
    default: str
    section: str | None = None
    resumes: bool = False
    planned: bool = False
    asks_reward: bool = False
    samples: bool = False

    def config_class(self) -> type:
        module, _, name = self.config.partition(":")
        return getattr(importlib.import_module(module), name)


RECIPES = {
    "train_sft": Recipe("recipes.sft.settings:SFTConfig", "sft_tiny", "sft", resumes=True, planned=True),
    "train_grpo": Recipe(
        "recipes.grpo.settings:GRPOConfig",
        "grpo_tiny",
        "grpo",
        resumes=True,
        planned=True,
        asks_reward=True,
        samples=True,
    ),
    "train_lftf": Recipe("recipes.bias.settings:LFTFConfig", "lftf_tiny", "lftf", resumes=True, planned=True),
    "locate_bias": Recipe("recipes.bias.settings:LocateConfig", "locate_bias", "locate"),
    "eval_bias": Recipe("recipes.bias.settings:BiasEvalConfig", "eval_bias"),
    "eval_video": Recipe("recipes.video_eval.settings:VideoEvalConfig", "eval_video"),
    "train_video_niah": Recipe("recipes.niah.settings:NiahConfig", "video_niah", "niah", resumes=True),
}


def main(arguments: list[str]) -> int:
    asked, *names = arguments or [""]
    if asked != "resumes" or len(names) != 1:
        print(f"error: {' '.join(arguments)}: give resumes and one of {', '.join(RECIPES)}", file=sys.stderr)
        return 2
    if names[0] not in RECIPES:
        print(f"error: there is no recipe {names[0]}; there are {', '.join(RECIPES)}", file=sys.stderr)
        return 2
    print("yes" if RECIPES[names[0]].resumes else "no")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
