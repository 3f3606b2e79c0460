"""The embedded source: responses sampled by the training weights, the prompt run once for all of its responses.

Responses that end leave at once and requests that wait take their place; keys and values are in pages, which memory follows.
What is sampled depends on a request alone: batches, pages, ranks and stages change the rounding of sums and nothing else.

Works under tensor, sequence and pipeline parallelism: every rank of a model-parallel group calls with the same arguments and
gets the same tokens. Pipeline stages work on as many lanes at a time as there are stages: while the last samples for one, the
first runs another.

Shape legend: r responses of a step, v vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.attention.cache import DecodeStep, PrefillStep
from megatron_ext.attention.pages import PAGE, PagePool
from megatron_ext.devices import device_type
from megatron_ext.errors import DivergedError, UserError
from megatron_ext.models.config import stream_multiple
from megatron_ext.models.gpt import PrefixGroupedGPT
from megatron_ext.models.media import next_position, pack_prompts
from megatron_ext.models.prompt_streams import StageRun, check_lengths, idle_run
from megatron_ext.rollouts.choosing import choose_tokens
from megatron_ext.rollouts.observing import begin, observe
from megatron_ext.rollouts.requests import Request, SamplingParams
from megatron_ext.rollouts.responses import Decode, Response
from megatron_ext.rollouts.scheduler import Lane, Sampled, check_fits, deal
from megatron_ext.rollouts.trajectories import Trajectory
from megatron_ext.rotary import find_scheme
from megatron_ext.runtime.collectives import LastValues
from megatron_ext.runtime.expert_load import most_of_experts
from megatron_ext.runtime.full_memory import full_memory_told
from megatron_ext.runtime.pieces import pieces_of
from megatron_ext.runtime.progress import PROGRESS

__all__ = ["MegatronSource"]


class MegatronSource:
    """
    Args:
        model: this rank's pipeline stage, without a DDP wrapper.
        decode: makes text of tokens, for stop strings.
        rollout_tokens: tokens whose keys and values are held at most, in pages; None: as many as there are.

    Attributes:
        lanes: of the last call: what their pools held, and how often responses stepped back.
    """

    def __init__(
        self,
        model: PrefixGroupedGPT,
        decode: Decode | None = None,
        rollout_tokens: int | None = None,
    ):
        self.model, self.decode, self.rollout_tokens = model, decode, rollout_tokens
        self.weight_version = 0
        self.lanes: list[Lane] = []

    def update_weights(self, version: int) -> None:
        self.weight_version = version

    @torch.no_grad()
    def sample(self, requests: Sequence[Request]) -> list[list[Trajectory]]:
        """
        Raises:
            UserError: an empty prompt; one that with its longest response exceeds the model's `encoder_seq_length` or
                `rollout_tokens`; stop strings without `decode`; memory is full.
        """
        pool = self._pages()
        self._check(requests, pool)
        device = next(self.model.parameters()).device
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        self.lanes = [Lane(PagePool(pool, device_type(device) == "cpu")) for _ in range(stages)]
        responses = deal(requests, self.lanes, self.decode)
        begin(responses)
        turns = [_Turn(self.model, lane, device) for lane in self.lanes]
        with full_memory_told(self._too_many):
            while most_of_experts(self.model.config, int(not all(turn.done for turn in turns))):
                for piece in range(len(pieces_of(self.model))):
                    for turn in turns:
                        if piece == 0:
                            turn.begin()
                        turn.run(piece)
            for turn in turns:
                turn.end()
        for lane in self.lanes:
            lane.pool.layers.clear()
        return [[response.trajectory(self.weight_version) for response in group] for group in responses]

    def _too_many(self) -> str:
        running, pages = (
            sum(x) for x in zip(*((len(lane.running), lane.pool.used) for lane in self.lanes), strict=True)
        )
        return (
            f"while responses are sampled, {running} at once with keys and values of {PAGE * pages} tokens: lower "
            f"trainer.grpo.rollout_tokens, which is {self.rollout_tokens}; tools/plan.py says what fits"
        )

    def _pages(self) -> int | None:
        """Of one lane."""
        if self.rollout_tokens is None:
            return None
        return self.rollout_tokens // PAGE // parallel_state.get_pipeline_model_parallel_world_size()

    def _check(self, requests: Sequence[Request], pages: int | None) -> None:
        check_lengths(self.model, [(r.prompt, max(map(r.limit, range(r.samples)))) for r in requests])
        if pages is not None:
            check_fits(requests, pages, self.rollout_tokens)
        if self.decode is None and any(r.params.stop_strings for r in requests):
            raise UserError("stop_strings are looked for in text: give the source a `decode`")


class _Turn:
    """What a lane is at: a prefill or a decoding step, from its beginning to its tokens.

    Tokens are taken from the last stage when the lane's next turn begins, so that the stages need not wait for each other.
    """

    def __init__(self, model: PrefixGroupedGPT, lane: Lane, device: torch.device):
        self.model, self.lane, self.device = model, lane, device
        self.last_piece = len(pieces_of(model)) - 1
        self.multiple = stream_multiple(model.model_config)
        self.scheme = find_scheme(model.model_config.position_embedding.scheme)
        self.asked: list[Response] = []
        self.stage_run: StageRun | None = None
        self.chosen: LastValues | None = None
        self.decoded: DecodeStep | None = None  # the newest

    @property
    def done(self) -> bool:
        return self.lane.done

    def begin(self) -> None:
        """Take the tokens of the turn before, and make the next one."""
        self.end()
        if entered := self.lane.enter():
            self.stage_run = self._prefill(entered)
        elif running := self.lane.step():
            self.stage_run = self._decode(running)
        elif self.model.config.expert_model_parallel_size > 1:
            self.asked, self.stage_run = [], idle_run(self.model)

    def end(self) -> None:
        """Take the tokens of a turn, if there is one."""
        if self.stage_run is not None:
            self.stage_run.wait()
            self._take_tokens()
            self.lane.leave()
        self.stage_run = self.chosen = None

    def run(self, piece: int) -> None:
        """On the last stage the last piece's logits become tokens, which are sent on their way. All ranks begin to wait for them
        here, so that what they broadcast stands in one order for all of them."""
        if self.stage_run is None:
            return
        logits = self.stage_run.piece(piece)
        PROGRESS.made()
        if piece == self.last_piece:
            empty = torch.empty(2, len(self.asked), device=self.device)
            chosen = _choose(logits, self.asked) if self.asked and logits is not None else empty
            self.chosen = LastValues(chosen, parallel_state.get_model_parallel_group())

    def _take_tokens(self) -> None:
        """The last stage's last rank decides for all, its tensor-parallel peers included: a cumulative sum on a GPU need not be
        the same twice, and ranks that disagree about one token would wait for each other for ever.

        Raises:
            DivergedError: a token's log-probability is not finite; all ranks of the replica see it.
        """
        tokens, logprobs = self.chosen.values().tolist()
        if not all(map(math.isfinite, logprobs)):
            raise DivergedError(
                "the model samples from logits that are not finite: it has diverged, or its numbers overflow in model.precision; "
                "go on from an earlier checkpoint, or with a lower learning rate"
            )
        for response, token, logprob in zip(self.asked, tokens, logprobs, strict=True):
            response.add(int(token), logprob)
        if awaiting := [response for response in self.asked if response.awaits]:
            observe(awaiting)

    def _prefill(self, entered: list[Sampled]) -> StageRun:
        """Prompts, each once, with what their responses have said before they stepped back."""
        groups: dict[object, list[Sampled]] = {}
        for sampled in entered:
            groups.setdefault(sampled.prompt, []).append(sampled)
        said = [[s for s in group if s.response.tokens] for group in groups.values()]
        tokens = [[s.response.tokens for s in group] for group in said]
        prompts = [prompt.request.prompt for prompt in groups]
        batch = pack_prompts(prompts, tokens, self.scheme, self.multiple, self.device)
        kept, last, ends = [], {}, []
        for segment in batch.groups.segments:
            end = segment.start + segment.length - 1
            if segment.is_prefix:
                prompt = list(groups)[segment.group]
                if not prompt.written:
                    kept.append((segment.start, segment.length, prompt.table))
                    prompt.written = True
                last |= dict.fromkeys(groups[prompt], end)
            else:
                again = said[segment.group][segment.response]
                kept.append((segment.start, segment.length, again.own))
                last[again] = end
        for sampled in entered:
            sampled.written = len(sampled.response.tokens)
        self.asked = [sampled.response for sampled in entered]
        ends = torch.tensor([last[sampled] for sampled in entered], device=self.device)
        record = PrefillStep(batch.groups, self.lane.pool, kept)
        return StageRun(self.model, batch.tokens, batch.position_ids, record, ends, batch.media)

    def _decode(self, running: list[tuple[Sampled, int]]) -> StageRun:
        """Everybody's last token, and what was observed before it. Who has more to observe is not asked yet."""
        self.asked, tokens, positions, rows, ends = [], [], [], [], []
        for sampled, stop in running:
            response = sampled.response
            behind = next_position(response.request.prompt, self.scheme)
            rows += sampled.rows(stop)
            tokens += response.tokens[sampled.written : stop]
            positions += [behind + place for place in range(sampled.written, stop)]
            sampled.written = stop
            if stop == len(response.tokens):
                self.asked.append(response)
                ends.append(len(rows) - 1)
        pad = [0] * (-len(rows) % self.multiple)
        given = torch.tensor([tokens + pad, positions + pad], dtype=self.scheme.dtype).to(self.device)  # one copy
        ends = torch.tensor(ends, dtype=torch.int64, device=self.device)
        self.decoded = DecodeStep(self.lane.pool, rows, self.decoded)
        return StageRun(self.model, given[0].long(), given[1], self.decoded, ends)


def _choose(logits: Tensor, responses: list[Response]) -> Tensor:
    """logits [r, v] -> fp32 [2, r]: tokens, whose ids are below 2 ** 24, and log-probabilities."""
    if len({id(response.params) for response in responses}) == 1:  # as of a step's requests: not even compared
        return _choose_alike(logits, responses)
    alike: dict[SamplingParams, list[int]] = {}
    for i, response in enumerate(responses):
        alike.setdefault(response.params, []).append(i)
    chosen = torch.empty(2, len(responses), device=logits.device)
    for numbers in alike.values():
        rows = torch.tensor(numbers, device=logits.device)
        chosen[:, rows] = _choose_alike(logits[rows], [responses[i] for i in numbers])
    return chosen


def _choose_alike(logits: Tensor, responses: list[Response]) -> Tensor:
    params, seen = responses[0].params, None
    uniform = torch.tensor([r.draws[len(r.tokens)] for r in responses], dtype=torch.float64)
    if params.repetition_penalty != 1:
        texts = [[*r.prompt, *r.tokens] for r in responses]
        longest = max(map(len, texts))
        seen = torch.tensor([text + text[:1] * (longest - len(text)) for text in texts], device=logits.device)
    return torch.stack([x.float() for x in choose_tokens(logits, params, uniform, seen)])
