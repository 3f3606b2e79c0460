"""Rollouts from vLLM servers, for one run of GRPO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_ext.rollouts.vllm import Home, VllmSource
from megatron_ext.runtime.engine import Engine
from recipes.data.rows import Prompt
from recipes.run.session import Session

__all__ = ["vllm_source"]

# Letters, white space, digits, marks and bytes beyond ASCII: tokenizers that agree here are hardly different ones.
PROBE = "The 3 words  \n\tare: naïve, 東京, 12.5%!"


def vllm_source(session: Session, engine: Engine, prompts: Sequence[Prompt]) -> VllmSource:
    """Ended with the session.

    Args:
        prompts: of the run; the first ones are the canary.
    """
    tokenizer = session.inputs.tokenizer
    canary = [token for prompt in prompts[:64] if prompt for token in prompt.tokens]
    home = Home(
        logs=session.log_dir,
        save_tokenizer=tokenizer.save,
        text=PROBE,
        ids=tuple(tokenizer.encode(PROBE)),
        canary=tuple(canary if len(canary) > 1 else canary * 2),
        gather_weights=engine.gather_weights,
        decode=tokenizer.decode_response,
    )
    settings = session.config.trainer.grpo
    options = replace(settings.rollout.options, routes=settings.router_replay == "R3")
    source = VllmSource(engine.module, options, home, ahead=settings.max_staleness > 0)
    session.at_end(source.close)
    session.say("responses come from vLLM servers: a run that is stopped and goes on samples others than it would have")
    if settings.max_staleness:
        weighed = (
            "and are weighed for it"
            if settings.off_policy
            else "which nothing makes up for: see trainer.grpo.off_policy"
        )
        session.say(
            f"responses are sampled by weights of up to {settings.max_staleness} steps before, {weighed}; a run that goes on "
            "samples anew what was in flight"
        )
    return source
