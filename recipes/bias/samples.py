"""What a model goes on to say behind a few prompts: figures do not show how it reads."""

from __future__ import annotations

from megatron_ext.models import PrefixGroupedGPT
from megatron_ext.rollouts import MegatronSource, Request, SamplingParams
from recipes.bias.prompts import PromptSet
from recipes.data.tokenizer import Tokenizer

__all__ = ["continuations"]


def continuations(
    model: PrefixGroupedGPT, tokenizer: Tokenizer, prompts: PromptSet, samples: int, tokens: int
) -> list[dict[str, str]]:
    """Greedy continuations of prompts without a hint, evenly spread over them, so that two models can be read side by side.
    Collective: every rank calls it, and has them.

    Args:
        tokens: of a continuation at most; fewer where `encoder_seq_length` has no room for them.

    Returns:
        `{"prompt", "text"}` of each; fewer than `samples` where there are fewer prompts.
    """
    chosen = prompts.without_hint(samples)
    room = model.model_config.encoder_seq_length
    # A prompt leaves room for a word at least, see `load_prompt_sets`.
    requests = [
        Request(ids, 1, SamplingParams(min(tokens, room - len(ids)), tokenizer.stop_ids, use_greedy=True))
        for _, ids in chosen
    ]
    found = MegatronSource(model).sample(requests) if requests else []
    return [
        {"prompt": prompt.prompt, "text": tokenizer.decode_response(ids, said.tokens)}
        for (prompt, ids), (said,) in zip(chosen, found, strict=True)
    ]
