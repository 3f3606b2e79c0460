"""Bytes on the ranks of each pipeline stage: what is always there, and the larger of what training and sampling add.

Exact: parameters, gradients, optimizer state (tests compare them with real ranks). As autograd saves them, for the
operations of a GPU: activations. Counted by hand from the code, and upper bounds: everything else (tests hold that of
attention against the bytes alive).

Symbols: t rows of the stream, u predicted tokens, r responses sampled together, h hidden size, n query and m key/value
heads of this rank, d head size, f and v this rank's width of the MLP and of the vocabulary, e bytes of a number.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_ext.attention.pages import GROWTH, PAGE, pages_of
from megatron_ext.losses.logprobs import default_chunk_size
from megatron_ext.models.config import GPTModelConfig, stream_multiple
from megatron_ext.planner.activations import StreamShape, expert_rows, on_gpu, projected_width, stage_activations
from megatron_ext.planner.buffers import StateBytes, overlap_bucket, state_bytes
from megatron_ext.planner.in_flight import in_flight
from megatron_ext.planner.job import Job, MicrobatchShape
from megatron_ext.planner.parameters import (
    adds_gradients,
    layers_of_stage,
    stage_parameters,
    stand_in_gradients,
    trained_of_stage,
    weights_train,
)
from megatron_ext.rollouts.scheduler import PREFILL_TOKENS

__all__ = ["StageMemory", "keys_and_values", "sampled_together", "stage_memory"]

FP32 = 4
# Of a trained block, beside the engine's: the best state so far, and the next one while it is copied.
BLOCK_COPIES = 2


@dataclass(frozen=True)
class StageMemory:
    """Bytes on the fullest rank of a pipeline stage.

    Attributes:
        parameters, gradients, optimizer: see `buffers.StateBytes`; and `stand_in_gradients`.
        copies: the reference policy's weights, or the trained block's.
        activations: of all microbatches in flight.
        working: what the backward pass of one layer, or one chunk of logits, holds for a moment.
        locating: gradients of all blocks, before there is an optimizer.
        cache: keys and values of sampling, and what a decoding step adds.
        host: in the host's memory: not in `total`.
    """

    stage: int
    parameters: int
    gradients: int
    optimizer: int
    copies: int = 0
    activations: int = 0
    working: int = 0
    locating: int = 0
    cache: int = 0
    host: int = 0

    @property
    def resident(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.copies

    @property
    def training(self) -> int:
        return self.resident + self.activations + self.working

    @property
    def sampling(self) -> int:
        return self.resident + self.cache

    @property
    def total(self) -> int:
        return max(self.training, self.sampling, self.parameters + self.locating + self.activations + self.working)

    def parts(self) -> dict[str, int]:
        """Name -> bytes, of what is there at the peak."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("stage", "host")}
        if self.total == self.training:
            unused = {"cache", "locating"}
        elif self.total == self.sampling:
            unused = {"activations", "working", "locating"}
        else:
            unused = {"gradients", "optimizer", "copies", "cache"}
        return {name: value for name, value in named.items() if value and name not in unused}


def stage_memory(job: Job, stage: int) -> StageMemory:
    """The fullest rank of one pipeline stage."""
    config = job.model
    parameters = stage_parameters(config, stage)
    state = _state(job, stage)
    item = config.dtype.itemsize
    copies = locating = host = 0
    if job.reference_copy:
        reference = item * sum(p.numel for p in trained_of_stage(config, stage, blocks=0))
        copies, host = (0, reference) if job.reference_on_host else (reference, 0)
    if job.blocks:
        copies += BLOCK_COPIES * item * sum(p.numel for p in trained_of_stage(config, stage, job.blocks))
    if job.locates:
        locating = item * sum(p.numel for p in parameters if p.layer is not None and not p.adapter)
    largest = job.largest()
    stream = largest.shape
    implementation = "local" if config.peft is not None else config.transformer_impl
    found = stage_activations(config, stage, stream, on_gpu(implementation, config.fp8 is not None))
    activations, inputs = in_flight(job, stage, found)
    return StageMemory(
        stage,
        state.parameters,
        state.gradients + item * stand_in_gradients(config, stage),
        state.optimizer,
        copies,
        activations,
        found.recomputed + max(_layer_working(config, largest), _output_working(config, stage, stream)),
        locating,
        _cache(job, stage) if job.rollout else 0,
        host + state.host + inputs,
    )


def _state(job: Job, stage: int) -> StateBytes:
    config = job.model
    trained = trained_of_stage(config, stage, job.blocks)
    names = {p.name for p in trained}
    # Of other blocks than the one that trains adapters are taken away.
    frozen = [p for p in stage_parameters(config, stage) if p.name not in names and not p.adapter]
    # Later stages have time for theirs while the first still runs.
    bucket = overlap_bucket(job.data_parallel) if job.overlap_grad_reduce and stage == 0 else None
    common = None, job.distributed_optimizer, job.moments, bucket
    apart = (
        config.expert_model_parallel_size > 1
    )  # experts have buffers of their own, over the ranks that hold the same ones
    parts = [([p for p in trained if not (apart and p.expert)], frozen, job.replicas)]
    if apart:
        parts.append(([p for p in trained if p.expert], [], job.expert_replicas))
    first, *others = (state_bytes(config, some, still, ranks, *common) for some, still, ranks in parts)
    return sum(others, first)


def _layer_working(config: GPTModelConfig, microbatch: MicrobatchShape) -> int:
    """The larger of what backward of attention and of the MLP hold beside what was saved."""
    t, h, e = microbatch.shape.tokens, config.hidden_size, config.dtype.itemsize
    f = config.ffn_hidden_size // config.tensor_model_parallel_size
    rows = 2 * t * h * e  # input and gradient of a column-parallel linear, of all rows
    weight = 0  # its gradient, before it is added
    if weights_train(config) and not adds_gradients(config):
        weight = 2 * f * h * e
    mlp = t * 3 * f * e + weight  # beside those of SwiGLU's input and output
    if config.num_moe_experts is not None:
        mlp = max(mlp, _experts_working(config, t))
    return rows + max(mlp, _attention_working(config, microbatch))


def _experts_working(config: GPTModelConfig, t: int) -> int:
    """Gradients of what experts were sent and gave back, in both orders, and of what is inside one after the other; all tokens of
    the stream on experts that are equally busy."""
    e, h, x = config.dtype.itemsize, config.hidden_size, config.expert_width // config.expert_tensor_ranks
    sent = expert_rows(config, t)
    return sent * (4 * h + 3 * x) * e + (0 if adds_gradients(config) else 2 * x * h * e)


def _attention_working(config: GPTModelConfig, microbatch: MicrobatchShape) -> int:
    """Of backward: while a kernel runs or, where context-parallel ranks sum gradients then, whichever is more."""
    t, d, e = microbatch.shape.tokens, config.kv_channels, config.dtype.itemsize
    n, m = config.heads_per_rank
    # Flash attention makes dk and dv of every query head and sums them afterwards; its own dq is in fp32.
    every_head = 2 * n * d * e if n > m else 0
    # The output's gradient; copies of it, of queries and of the output; dq as a call gives it, the kernel's, and ours. Of each
    # row, a copy of the log-sum-exp, and the sum of gradient x output.
    queries = n * (d * (5 * e + 2 * FP32) + 2 * FP32)
    kernel = t * (queries + 2 * m * d * (2 * e + FP32) + every_head)  # copies, gradients of a call, and ours
    if config.shares_key_value_heads:
        # The gradient of all ranks' projections, in their order, cut for the ranks, and this one's share of the sum.
        kernel = max(kernel, 4 * t * projected_width(config) * e)
    if config.context_parallel_size == 1 or config.cp_comm_type == "a2a":
        return kernel
    # Keys and values are gathered again, and their gradients are fp32. A call reads a prefix at most twice: for what this
    # rank has of it, and for the responses.
    gathered = microbatch.shape.gathered
    kernel += gathered * (2 * m * d * (e + FP32) + 2 * (2 * m * d * 2 * e + every_head))
    # Then gradients of gathered rows are there three times: as computed, joined, and in the order of ranks.
    summed = gathered * 2 * m * d * (e + 3 * FP32) + t * d * (2 * m * (3 * e + 2 * FP32) + 2 * n * e)
    return max(kernel, summed)


def _output_working(config: GPTModelConfig, stage: int, stream: StreamShape) -> int:
    """Logits of one chunk with their scratch, and the gradients of the rows and of the vocabulary's weights."""
    h, e, tp = config.hidden_size, config.dtype.itemsize, config.tensor_model_parallel_size
    v = config.padded_vocab_size // tp
    weight = v * h * e if weights_train(config) else 0
    if stage < config.pipeline_model_parallel_size - 1:
        return weight if stage == 0 else 0
    rows = min(config.logprob_chunk_size or default_chunk_size(v, "cuda"), stream.predicted)
    logits = rows * v * (FP32 + FP32 // 4 + (e if e < FP32 else 0))
    return logits + weight + stream.predicted * h * e


def _cache(job: Job, stage: int) -> int:
    """Keys and values in pages, partial results of one layer's attention, the prefill's widest tensors, and logits."""
    config, together = job.model, sampled_together(job)
    e, tp, v = config.dtype.itemsize, config.tensor_model_parallel_size, config.padded_vocab_size
    # At first responses are short, and more of them have room than when they are long: about twice as many.
    prompts = min(2 * together, _local_prompts(job)) if job.rollout_tokens else together
    rows = -(-prompts * job.samples // config.pipeline_model_parallel_size)  # of a lane
    tokens = together * _tokens_of_group(job)
    held = keys_and_values(
        config, stage, min(tokens + tokens // GROWTH, job.rollout_tokens or tokens + tokens // GROWTH)
    )
    # A query, its result in fp32 and as the kernel gives it, of every page of a response and of each response's prompt; of latent
    # attention absorbed.
    n, d = config.heads_per_rank[0], config.cached_channels if config.multi_latent_attention else config.kv_channels
    parts = (together * job.samples * pages_of(job.response) + rows) * n * d * (2 * e + FP32)
    multiple = stream_multiple(config)
    t = -(-min(prompts * job.prompt, max(PREFILL_TOKENS, job.prompt)) // multiple) * multiple
    prefill = t * (3 * config.ffn_hidden_size // tp + 2 * config.hidden_size) * e
    if config.num_moe_experts is not None:
        prefill = max(prefill, _experts_working(config, t))
    if config.multi_latent_attention:  # keys and values as they are made, and as attention takes them
        prefill = max(prefill, t * n * (config.qk_head_dim + config.v_head_dim + 3 * config.kv_channels) * e)
    last = stage == config.pipeline_model_parallel_size - 1
    # fp32 logits, scaled once more, and their cumulative sum in fp64; as much again is for what filters sort.
    logits = rows * v * (2 * FP32 + 2 * 8) if last else 0
    return held + max(parts, logits, prefill)


def keys_and_values(config: GPTModelConfig, stage: int, tokens: int) -> int:
    """Bytes of so many tokens' keys and values on one rank."""
    per_token = config.cached_channels * config.dtype.itemsize
    return len(layers_of_stage(config, stage)) * per_token * tokens


def sampled_together(job: Job) -> int:
    """Prompts whose responses have room on a rank at a time, when they are as long as they get."""
    local = _local_prompts(job)
    return min(local, max(1, job.rollout_tokens // _tokens_of_group(job))) if job.rollout_tokens else local


def _local_prompts(job: Job) -> int:
    """Context-parallel ranks share them out."""
    return -(-job.local_groups * job.updates // job.model.context_parallel_size)


def _tokens_of_group(job: Job) -> int:
    """In pages: a prompt once for all its responses."""
    return PAGE * (pages_of(job.prompt) + job.samples * pages_of(job.response))
