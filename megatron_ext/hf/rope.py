"""What a config.json says of rotary positions, in the spellings of all years."""

from __future__ import annotations

from typing import Any

from megatron_ext.errors import UserError
from megatron_ext.hf.raw import integer, number
from megatron_ext.models.config import PositionEmbedding
from megatron_ext.rotary import RopeScaling

__all__ = ["ROPE", "read_position"]

ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings")
DEFAULT_ROPE = {"rope_theta": 10000.0}
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor")
MROPE = ("mrope_section", "mrope_interleaved")


def read_position(config: dict[str, Any], where: str) -> PositionEmbedding:
    """transformers 5 writes rope_parameters; before, it was rope_theta beside rope_scaling, which still comes first."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(
            f"{where}: rope_scaling or rope_parameters must be an object, got {rope!r}; fetch the file again"
        )
    rope = {key: value for key, value in rope.items() if value is not None}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "mrope" or (kind == "linear" and rope.get("factor") == 1):  # Qwen2-VL's older name; all as it was
        kind = "default"
    if kind not in ("default", "llama3"):
        raise UserError(f"{where}: rope_type={kind!r} is not supported, only default and llama3; choose another model")
    for source in (rope, config):
        if source.get("partial_rotary_factor") not in (None, 1):
            raise UserError(
                f"{where}: partial_rotary_factor={source['partial_rotary_factor']} is not supported, only 1"
            )
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings", *MROPE}
    if kind == "llama3":
        known |= {*LLAMA3}
    elif rope.get("factor") == 1:
        known |= {"factor"}
    if unknown := sorted(rope.keys() - known):
        raise UserError(f"{where}: {unknown[0]} is not known of rope_type={kind!r}; choose another model")
    theta = next((source for source in (rope, config) if source.get("rope_theta") is not None), DEFAULT_ROPE)
    base = number(theta, "rope_theta", where)
    if base == 0:
        raise UserError(f"{where}: rope_theta must be more than 0, got {base}; fetch the file again")
    media = _media_scheme(rope, where)
    if kind == "default":
        return PositionEmbedding(base=base, **media)
    original = "original_max_position_embeddings"
    if config.get(original) not in (None, rope.get(original)):
        raise UserError(f"{where}: {original} stands beside the rope's own, which is {rope.get(original)}; correct one")
    length = integer(*((config, "max_position_embeddings") if original not in rope else (rope, original)), where)
    factors = [number(rope, key, where) for key in LLAMA3]
    try:
        scaling = RopeScaling(*factors, length)
    except UserError as error:
        raise UserError(f"{where}: rope_type='llama3' with {error}; fetch the file again") from error
    return PositionEmbedding(base=base, scaling=scaling, **media)


def _media_scheme(rope: dict[str, Any], where: str) -> dict[str, Any]:
    """Of a language model that was taken out of one of images and videos: scheme and sections."""
    sections, interleaved = rope.get("mrope_section"), rope.get("mrope_interleaved", False)
    if sections is None:
        return {}
    if not isinstance(sections, list) or len(sections) != 3 or any(type(n) is not int or n < 0 for n in sections):
        raise UserError(
            f"{where}: mrope_section must be three integers, got {str(sections)[:80]}; fetch the file again"
        )
    if not isinstance(interleaved, bool):
        raise UserError(f"{where}: mrope_interleaved must be true or false, got {interleaved!r}; fetch the file again")
    return {"scheme": "mrope_interleaved" if interleaved else "mrope", "sections": sections}
