"""What transformers has called a tensor, in the spellings of all years, and what it is called here.

Here it is one spelling for all models: `model.` before what is the language model's, `vision_tower.` and `multi_modal_projector.`
before what belongs to its eyes.
"""

from __future__ import annotations

import re

__all__ = ["PROJECTOR", "TOWER", "bare_name", "common_name", "spelled"]

TOWER = "vision_tower."
PROJECTOR = "multi_modal_projector."
# What transformers has called a part -> what it is called here.
SPELLINGS = (
    (re.compile(r"^(model\.)?language_model\.model\."), "model."),
    (re.compile(r"^(model\.)?language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^(model\.)?language_model\."), "model."),
    (re.compile(r"^(model\.)?(vision_tower|visual)\.(vision_model\.)?"), TOWER),
    (re.compile(r"^(model\.)?multi_modal_projector\."), PROJECTOR),
    (re.compile(r"^(model\.)?(?=image_newline$)"), PROJECTOR),
)


def common_name(stored: str) -> str:
    """The name here of a tensor in a file."""
    for pattern, ours in SPELLINGS:
        if pattern.match(stored):
            return pattern.sub(ours, stored, count=1)
    return stored


def spelled(name: str, model_type: str | None) -> str:
    """What transformers 5 calls it in the files of such a model; None: of a language model."""
    if model_type is None:
        return name
    if model_type in ("llava", "llava_next", "llava_onevision"):
        name = f"language_model.{name}" if name.startswith(("model.", "lm_head.")) else name
        return name.removeprefix(PROJECTOR) if name == f"{PROJECTOR}image_newline" else name
    if model_type == "qwen3_vl":
        name = name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name
        return name.replace(TOWER, "model.visual.", 1) if name.startswith(TOWER) else name
    return name.replace(TOWER, "visual.", 1) if name.startswith(TOWER) else name


def bare_name(name: str) -> str:
    """Of a tensor of a tower, without what stands before it: in a folder of its own it has no prefix, or `vision_model.`."""
    return name.removeprefix(TOWER).removeprefix("vision_model.")
