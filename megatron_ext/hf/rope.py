"""What a config.json says of rotary positions, in the spellings of all years."""

from __future__ import annotations

from typing import Any

from megatron_ext.errors import UserError
from megatron_ext.hf.raw import integer, number, switch
from megatron_ext.models.config import PositionEmbedding
from megatron_ext.rotary import ROPE_TYPES, RopeScaling

__all__ = ["ROPE", "read_position", "write_scaling"]

ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings")
ORIGINAL = "original_max_position_embeddings"
# Left out they mean what `RopeScaling` assumes, as in transformers; of some 0 says the same.
OPTIONAL, NOTHING = ("attention_factor", "truncate"), ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")
SWITCHES, LISTS = ("truncate",), ("short_factor", "long_factor")
MROPE = ("mrope_section", "mrope_interleaved")


def read_position(config: dict[str, Any], where: str, theta: float, rotated: float | None = None) -> PositionEmbedding:
    """transformers 5 writes rope_parameters; before, it was rope_theta beside rope_scaling, which still comes first.

    Args:
        theta: of a file that does not say it.
        rotated: the share of a head that rotates, of a file that does not say it; None: a family that rotates all of it.
    """
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(
            f"{where}: rope_scaling or rope_parameters must be an object, got {rope!r}; fetch the file again"
        )
    rope = {key: value for key, value in rope.items() if value is not None}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "mrope" or (kind == "linear" and rope.get("factor") == 1):  # Qwen2-VL's older name; all as it was
        kind = "default"
    if kind != "default" and (not isinstance(kind, str) or kind not in ROPE_TYPES):
        known = ", ".join(("default", *ROPE_TYPES))
        raise UserError(f"{where}: rope_type={kind!r} is not supported, only {known}; choose another model")
    percent = _rotated(rope, config, where, rotated)
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", ORIGINAL, *MROPE, *ROPE_TYPES.get(kind, ())}
    if kind == "default" and rope.get("factor") == 1:
        known |= {"factor"}
    if unknown := sorted(rope.keys() - known):
        raise UserError(f"{where}: {unknown[0]} is not known of rope_type={kind!r}; choose another model")
    said = next((s for s in (rope, config) if s.get("rope_theta") is not None), {"rope_theta": theta})
    base = number(said, "rope_theta", where)
    if base == 0:
        raise UserError(f"{where}: rope_theta must be more than 0, got {base}; fetch the file again")
    media = _media_scheme(rope, where) | {"percent": percent}
    if kind == "default":
        return PositionEmbedding(base=base, **media)
    try:
        return PositionEmbedding(base=base, scaling=_scaling(kind, rope, config, where), **media)
    except UserError as error:
        if str(error).startswith(where):
            raise
        raise UserError(f"{where}: rope_type={kind!r} with {error}; fetch the file again") from error


def _rotated(rope: dict[str, Any], config: dict[str, Any], where: str, rotated: float | None) -> float:
    """The share of a head that rotates."""
    key = "partial_rotary_factor"
    given = [source[key] for source in (rope, config) if source.get(key) is not None]
    if rotated is None:
        for value in given:
            if value != 1:
                raise UserError(f"{where}: {key}={value} is not supported, only 1")
        return 1.0
    share = number({key: given[0] if given else rotated}, key, where)
    if not 0 < share <= 1:
        raise UserError(f"{where}: {key}={share} must lie in (0, 1]; fetch the file again")
    return float(share)


def _scaling(kind: str, rope: dict[str, Any], config: dict[str, Any], where: str) -> RopeScaling:
    """What a type leaves out means what transformers takes for it."""
    found: dict[str, Any] = {"rope_type": kind}
    if kind == "dynamic":  # of which the original length is not asked for
        found[ORIGINAL] = integer(config, "max_position_embeddings", where)
    elif ORIGINAL in ROPE_TYPES[kind]:
        if config.get(ORIGINAL) is not None and rope.get(ORIGINAL, config[ORIGINAL]) != config[ORIGINAL]:
            raise UserError(f"{where}: {ORIGINAL} stands beside the rope's own, which is {rope[ORIGINAL]}; correct one")
        given = next((source for source in (rope, config) if source.get(ORIGINAL) is not None), None)
        found[ORIGINAL] = integer(*((given, ORIGINAL) if given else (config, "max_position_embeddings")), where)
    if kind in ("yarn", "longrope") and rope.get("factor") is None:
        found["factor"] = integer(config, "max_position_embeddings", where) / found[ORIGINAL]
    for key in ROPE_TYPES[kind]:
        if key in found or (key in OPTIONAL and key not in rope) or (key in NOTHING and not rope.get(key)):
            continue
        if key in SWITCHES:
            found[key] = switch(rope, key, where)
        elif key in LISTS:
            found[key] = _numbers(rope, key, where)
        else:
            found[key] = number(rope, key, where)
    return RopeScaling(**found)


def _numbers(rope: dict[str, Any], key: str, where: str) -> list[float]:
    given = rope.get(key)
    if not isinstance(given, list):
        raise UserError(f"{where}: {key} must be a list of numbers, got {str(given)[:80]}; fetch the file again")
    return [number({key: value}, key, where) for value in given]


def write_scaling(scaling: RopeScaling) -> dict[str, Any]:
    """The keys of a config.json for it."""
    keys = [key for key in ROPE_TYPES[scaling.rope_type] if (scaling.rope_type, key) != ("dynamic", ORIGINAL)]
    given = {key: getattr(scaling, key) for key in keys}
    return {"rope_type": scaling.rope_type} | {key: value for key, value in given.items() if value is not None}


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
