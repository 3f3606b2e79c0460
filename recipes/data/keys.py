"""Which keys a row may have: what is read, what is harmless, and what to do about any other."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

from recipes.data.errors import DataError

__all__ = ["HARMLESS", "check_keys", "remedy"]

# What tells rows apart, or where they come from; and, so that one file serves both recipes, what GRPO's verifier
# compares with and what SFT learns. See docs/data.md.
HARMLESS = frozenset(
    "id _id uid uuid idx index prompt_id source data_source dataset split category ability subject topic level difficulty "
    "language tags url license metadata meta extra_info answer response".split()
)
# In other tools these reach the model. -> what to do here.
MEANT_FOR_MODEL = {
    **dict.fromkeys(
        ("system", "system_prompt"), 'write it as the first of messages, {"role": "system", "content": ...}'
    ),
    "history": "write its turns into messages",
    **dict.fromkeys(
        ("conversations", "conversation"),
        'write messages, [{"role": "user", "content": ...}, {"role": "assistant", ...}]',
    ),
    **dict.fromkeys(("audio", "audios"), "a model here hears nothing; remove it"),
    **dict.fromkeys(("instruction", "query"), "write what the model reads as prompt, or as a user's message"),
    **dict.fromkeys(
        ("tools", "chat_template_kwargs"), "a chat template reads it, and a prompt has none: write messages"
    ),
}
# Here they are a reward's, if it is one of your own, and nobody's otherwise.
MEANT_AS_TEXT = {
    **dict.fromkeys(("input", "question", "text"), "write what the model reads as prompt, or as a user's message"),
    **dict.fromkeys(
        ("output", "completion", "target", "chosen"),
        "write what is learnt as response, or as the assistant's last message",
    ),
    "response": "what is learnt of a conversation is its last message, the assistant's",
}


def check_keys(
    row: Mapping[str, Any],
    used: Collection[str],
    where: str,
    reward_keys: Collection[str] | None = (),
    harmless: Collection[str] = HARMLESS,
) -> None:
    """Refuse keys that nothing reads. A null counts as absent.

    Args:
        used: keys that are read, whatever they hold.
        reward_keys: what the reward reads; None: it is handed the row and does not say. Then only what is meant for the
            model in other tools is refused.

    Raises:
        DataError: with the key and the remedy.
    """
    known = {*used, *harmless} if reward_keys is None else {*used, *harmless, *reward_keys}
    for key, value in row.items():
        if value is not None and key not in known and (reward_keys is not None or key in MEANT_FOR_MODEL):
            raise DataError(f"{where}: nothing reads the key {key}: {remedy(key) or _hint(key, used)}")


def remedy(key: str) -> str | None:
    """Where that goes here which other tools call by this key."""
    return MEANT_FOR_MODEL.get(key) or MEANT_AS_TEXT.get(key)


def _hint(key: str, used: Collection[str]) -> str:
    if close := get_close_matches(key.lower(), used, n=1):
        return f"did you mean {close[0]}?"
    return "remove it, or name it in data.ignored_keys"
