"""The embedded source: many responses of each prompt from the training weights, the prompt run once for all of them.

Works under tensor, sequence and pipeline parallelism: every rank of a model-parallel group calls with the same arguments
and gets the same tokens.

Shape legend: t prompt tokens in the packed stream, r responses, v vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ext.attention.cache import DecodeStep, PrefillStep, SharedPrefixCache
from megatron_ext.errors import UserError
from megatron_ext.models.config import stream_multiple
from megatron_ext.models.gpt import PrefixGroupedGPT
from megatron_ext.models.media import next_position, pack_prompts
from megatron_ext.models.prompt_streams import check_lengths, from_last_stage, run_stage
from megatron_ext.rollouts.choosing import choose_tokens
from megatron_ext.rollouts.requests import Request, SamplingParams
from megatron_ext.rollouts.responses import Decode, Response
from megatron_ext.rollouts.trajectories import Trajectory

__all__ = ["MegatronSource"]


class MegatronSource:
    """
    Args:
        model: this rank's pipeline stage, without a DDP wrapper.
        decode: makes text of tokens, for stop strings.
        together: prompts decoded together; None: all.
    """

    def __init__(
        self,
        model: PrefixGroupedGPT,
        decode: Decode | None = None,
        together: int | None = None,
    ):
        self.model, self.decode, self.together = model, decode, together
        self.weight_version = 0

    def update_weights(self, version: int) -> None:
        self.weight_version = version

    @torch.no_grad()
    def sample(self, requests: Sequence[Request]) -> list[list[Trajectory]]:
        """
        Raises:
            UserError: an empty prompt, or prompt plus response longer than the model's `encoder_seq_length`.
        """
        self._check(requests)
        found: list[list[Trajectory]] = []
        for _, alike in itertools.groupby(requests, lambda r: (r.params, r.samples)):
            part = list(alike)
            size = self.together or len(part)
            for first in range(0, len(part), size):
                found += self._sample(part[first : first + size])
        return found

    def _check(self, requests: Sequence[Request]) -> None:
        check_lengths(self.model, [(r.prompt, max(map(r.limit, range(r.samples)))) for r in requests])
        if self.decode is None and any(r.params.stop_strings for r in requests):
            raise UserError("stop_strings are looked for in text: give the source a `decode`")

    def _sample(self, requests: list[Request]) -> list[list[Trajectory]]:
        """Requests of equal parameters and numbers of samples."""
        model, prompts, samples, params = (
            self.model,
            [r.prompt for r in requests],
            requests[0].samples,
            requests[0].params,
        )
        device = next(model.parameters()).device
        multiple = stream_multiple(model.model_config)
        scheme = model.model_config.position_embedding.scheme
        batch = pack_prompts(prompts, [[] for _ in prompts], scheme, multiple, device)
        cache = SharedPrefixCache(batch.groups, samples, params.max_new_tokens)
        ends = torch.tensor([s.start + s.length - 1 for s in batch.groups.segments], device=device)
        first_position = torch.tensor([next_position(p, scheme) for p in prompts], device=device)
        first_position = first_position.repeat_interleave(samples)
        logits = run_stage(model, batch.tokens, batch.position_ids, PrefillStep(cache), ends, batch.media)
        if logits is not None:
            logits = logits.repeat_interleave(samples, 0)  # [r, v]
        said = [Response(r, i, self.decode) for r in requests for i in range(samples)]
        padded = cache.num_responses + -cache.num_responses % multiple
        rows = torch.arange(cache.num_responses, device=device)
        for index in range(params.max_new_tokens):
            tokens = self._choose(logits, params, said, index, device)
            if all(response.finish_reason for response in said):
                break
            step_tokens, step_positions = tokens.new_zeros(padded), tokens.new_zeros(padded)
            step_tokens[: len(tokens)], step_positions[: len(tokens)] = tokens, first_position + index
            logits = run_stage(model, step_tokens, step_positions, DecodeStep(cache, index), rows)
        done = [response.trajectory(self.weight_version) for response in said]
        return [done[i : i + samples] for i in range(0, len(done), samples)]

    @staticmethod
    def _choose(
        logits: Tensor | None, params: SamplingParams, said: list[Response], index: int, device: torch.device
    ) -> Tensor:
        """The last stage's last rank decides for all, its tensor-parallel peers included: a cumulative sum on a GPU need not be
        the same twice, and ranks that disagree about one token would wait for each other for ever."""
        chosen = None
        if logits is not None:
            uniform = torch.tensor([r.draws[index] for r in said], dtype=torch.float64)
            seen = None
            if params.repetition_penalty != 1:
                texts = [[*r.prompt, *r.tokens] for r in said]
                longest = max(map(len, texts))
                seen = torch.tensor([t + t[:1] * (longest - len(t)) for t in texts], device=device)
            chosen = torch.stack(
                [x.float() for x in choose_tokens(logits, params, uniform, seen)]
            )  # ids are below 2 ** 24
        chosen = from_last_stage(chosen, (2, len(said)), device)
        for response, token, logprob in zip(said, *chosen.tolist(), strict=True):
            if not response.finish_reason:
                response.add(int(token), logprob)
        return chosen[0].long()
