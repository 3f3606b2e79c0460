"""Whole steps as a GPU would take them, by one process that is any rank of a layout.

Each is a step of the training engine or of the sampler on a small bf16 model. Give them to `run_ranks(steps, 1, names)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_ext.attention.pages import PAGE
from megatron_ext.blocks.pairs import pack_pairs, split_pairs
from megatron_ext.blocks.places import ModelPlace
from megatron_ext.blocks.training import train_only_places
from megatron_ext.grouping import PackedTokens
from megatron_ext.losses import ADVANTAGES, OBJECTIVES, GrpoTerms, grpo_loss, token_weights
from megatron_ext.losses.advantages import groups_with_signal, takes_each
from megatron_ext.losses.high_entropy import high_entropy_tokens
from megatron_ext.losses.lftf import LOSSES, kept_text_loss, pair_loss
from megatron_ext.losses.overlong import overlong_penalty
from megatron_ext.models import GPTModelConfig, PrefixGroupedGPT, build_gpt
from megatron_ext.models.config import stream_multiple
from megatron_ext.models.media import pack_prompts
from megatron_ext.rollouts import MegatronSource, Request, SamplingParams
from megatron_ext.runtime.distributed import ParallelSizes
from megatron_ext.runtime.engine import Engine, Microbatch
from megatron_ext.runtime.optim import OptimConfig
from megatron_ext.runtime.reference import ReferenceBase, ReferenceWeights
from recipes.grpo.batches import GRPOMicrobatch
from recipes.sft.batches import SFTMicrobatch, negative_log_likelihood
from tests.dry.machine import pretended_gpu
from tests.dry.models import (
    DEEPSEEK,
    EXPERTS,
    EYES,
    GPT_OSS,
    LATENT_LORA,
    LATENT_ROWS,
    LONG,
    LORA,
    OTHER_KEYS,
    SINKS,
    WINDOW,
)
from tests.dry.run import (
    BACKWARD,
    CHOOSE,
    COUNTS,
    HOST_STEP,
    INPUTS,
    KEPT,
    LOAD,
    METRICS,
    NORM,
    PATCHES,
    SEEN,
    SHAPES,
    SPREAD,
    STREAMS,
    TOKENS,
    WAITS_FOR_ROWS,
    DryRun,
)
from tests.dry.seeing import FILMS, TOWERS, films, images, patches, pictures, tiles
from tests.gpt_cases import small_config
from tests.pretend import be_alone, pretend

__all__ = ["STEPS", "Step", "steps", "take"]

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [3, 4, 5]]
RESPONSES = [[[1, 2, 3], [1, 2, 4, 5], [9]], [[7, 7], [7, 7, 8]]]
NEW_TOKENS = 3
PARAMETERS = 20  # of the small model
STREAM_SHAPE = 32, 1, 32  # of its hidden states, for the prompts and responses above
UPDATE = {(NORM, "value"): 1, (METRICS, "copy"): 1}
TWICE = {name: 2 * count for name, count in UPDATE.items()}
STAGE = {(NORM, "value"): 1, (SHAPES, "copy"): 2}
PIECES = {(NORM, "value"): 1, (SHAPES, "copy"): 6}
SAMPLE = {(CHOOSE, "copy"): NEW_TOKENS}
PAGES = {(CHOOSE, "copy"): PAGE + NEW_TOKENS + 3}  # the second prompt is run when the first has been, and once more
LANES = {(CHOOSE, "copy"): 2 * NEW_TOKENS}  # of either prompt


def dispatched(passes: int, copies: int = 2) -> dict[tuple[str, str], int]:
    """An update of a model with two layers of experts, through which as many streams go."""
    return sampled(2 * passes, copies) | {(LOAD, "copy"): 1}


def sampled(layers: int, copies: int = 2) -> dict[tuple[str, str], int]:
    """So many times a layer with experts: which rows, and with which weights, go where."""
    return {(COUNTS, "copy"): copies * layers} | dict.fromkeys(WAITS_FOR_ROWS, 2 * layers)


def asked(**reads: int) -> dict[tuple[str, str], int]:
    """What transformers' towers of Qwen read of pictures' sizes: a few times a pass, and thrice a layer, to cut what attends."""
    return {(PATCHES, how): count for how, count in reads.items()}


@dataclass(frozen=True)
class Step:
    """
    Attributes:
        take: on a model and its device; what it does is watched.
        reads: what the host reads in it, see `NECESSARY`.
        fields: changes to `small_config`.
        world, rank, sizes: who this process is.
    """

    take: Callable[[PrefixGroupedGPT, torch.device], None]
    reads: dict[tuple[str, str], int]
    fields: dict[str, Any] = field(default_factory=dict)
    world: int = 1
    rank: int = 0
    sizes: ParallelSizes = field(default_factory=ParallelSizes)

    @property
    def config(self) -> GPTModelConfig:
        spread = {
            "tensor_model_parallel_size": self.sizes.tensor, "pipeline_model_parallel_size": self.sizes.pipeline,
            "context_parallel_size": self.sizes.context, "expert_model_parallel_size": self.sizes.expert,
        }  # fmt: skip
        return small_config(**({"logprob_chunk_size": None, "precision": "auto"} | spread | self.fields))


def stream(model: PrefixGroupedGPT, device: torch.device, min_shared: int | None = None) -> PackedTokens:
    config = model.model_config
    return pack_prompts(
        PROMPTS, RESPONSES, config.position_embedding.scheme, stream_multiple(config), device, min_shared=min_shared
    )


def sft(model: PrefixGroupedGPT, device: torch.device, **optim: Any) -> None:
    engine = Engine(model, OptimConfig(**optim))
    engine.update(sft_streams(model, device), negative_log_likelihood)


def sft_streams(model: PrefixGroupedGPT, device: torch.device) -> list[SFTMicrobatch]:
    batches = [stream(model, device) for _ in range(2)]
    return [SFTMicrobatch(b, learnt=b.loss_mask(), global_tokens=26.0) for b in batches]


def sft_stage(model: PrefixGroupedGPT, device: torch.device) -> None:
    """Of a pipeline: an update without its metrics, which one process cannot be told by the last stage."""
    engine = Engine(model, OptimConfig())
    engine.zero_grad()
    engine.run(sft_streams(model, device), negative_log_likelihood)
    engine.step()


def grpo(
    terms: GrpoTerms, level: str | None = None, min_shared: int | None = None, on_host: bool = False, **optim: Any
) -> Callable:
    """Old, reference and actor pass, and the update."""

    def step(model: PrefixGroupedGPT, device: torch.device) -> None:
        engine = Engine(model, OptimConfig(**optim))
        adapted = model.model_config.peft is not None
        initial = ReferenceBase(engine) if adapted else ReferenceWeights(engine, on_host)
        batch = stream(model, device, min_shared)
        ids, count = batch.groups.response_ids, batch.groups.num_responses
        normalisation = level or terms.objective.normalisation
        weights = token_weights(ids, batch.loss_mask(), count, 13.0, 5.0, normalisation, 60.0)
        advantages = torch.linspace(-1, 1, count, device=device)[ids]
        drawn = GRPOMicrobatch(batch, 0.9, advantages=advantages, weights=weights)
        (old,), (entropies,) = engine.score_with_entropies([drawn])
        (kept,) = high_entropy_tokens([entropies], [weights > 0], 0.2)
        with initial.used():
            (reference,) = engine.score([drawn])

        def loss(m: GRPOMicrobatch, logprobs: Tensor, entropy: Tensor):
            return grpo_loss(
                logprobs, m.old_logprobs, m.advantages, m.weights, terms, m.ref_logprobs, entropy, ids, count, None, kept,
            )  # fmt: skip

        engine.update([replace(drawn, old_logprobs=old, ref_logprobs=reference)], loss)

    return step


def objectives(model: PrefixGroupedGPT, device: torch.device) -> None:
    """Every one of the registry, forward and backward, on tokens that have been scored."""
    old, reference, gains, weights, entropy = torch.rand(5, 13, device=device)
    ids = torch.zeros(13, dtype=torch.int64, device=device)
    for make in OBJECTIVES.values():
        logprobs = torch.rand(13, device=device).requires_grad_()
        terms = GrpoTerms(make(), kl_penalty=0.05)
        loss, _ = grpo_loss(logprobs, old, gains, weights, terms, reference, entropy, ids, 5, weights, weights > 0)
        loss.backward()


def advantages(model: PrefixGroupedGPT, device: torch.device) -> None:
    """Of every kind, on a step's rewards."""
    rewards = torch.empty(3, 4, dtype=torch.float64, device=device)
    for name, of in ADVANTAGES.items():
        given = (torch.stack((rewards, rewards), -1), rewards[0, :2]) if takes_each(of) else (rewards,)
        assert of(*given).shape == rewards.shape, name
    groups_with_signal(rewards)
    overlong_penalty(rewards, 20, 4)


def lftf(model: PrefixGroupedGPT, device: torch.device) -> None:
    """A head and the MLP of one block, or its adapters, all losses of pairs, and that of text."""
    parts = [ModelPlace(1, "attention", (0,)), ModelPlace(1, "mlp")]
    train_only_places(model, parts if model.model_config.peft is None else [ModelPlace(1)])
    config, batch = model.model_config, stream(model, device)
    engine = Engine(model, OptimConfig())
    pairs = pack_pairs(PROMPTS, (3, 4), config, device)

    def loss(microbatch: Microbatch, logprobs: Tensor, entropy: Tensor):
        if microbatch.batch is batch:
            value = kept_text_loss(logprobs, torch.zeros_like(logprobs)).sum()
        else:
            frozen = torch.full((len(PROMPTS), 2), 0.1, device=device)
            names = [name for name in LOSSES if name != "kl"]
            value = sum(pair_loss(name, *split_pairs(logprobs), frozen).sum() for name in names)
        return value, {"loss": value.detach()}

    engine.update([Microbatch(pairs), Microbatch(batch)], loss)


def sample(model: PrefixGroupedGPT, device: torch.device) -> None:
    params = SamplingParams(NEW_TOKENS, (2,), temperature=0.8, top_k=5, top_p=0.9, min_p=0.01, repetition_penalty=1.1)
    found = MegatronSource(model).sample(Request.each(PROMPTS, 3, params))
    assert [len(t) for group in found for t in group] == [NEW_TOKENS] * 6  # nothing ends: 0 is no stop token


def sample_pages(model: PrefixGroupedGPT, device: torch.device) -> None:
    """Prompts and responses that fill pages, in a pool that is too small for all at once."""
    prompts, few = [[7] * 70, [5] * 33], SamplingParams(PAGE + NEW_TOKENS, (2,))
    source = MegatronSource(model, rollout_tokens=8 * PAGE)
    found = source.sample([r.limited([1, PAGE + NEW_TOKENS]) for r in Request.each(prompts, 2, few)])
    assert [len(t) for group in found for t in group] == 2 * [1, PAGE + NEW_TOKENS]


def greedy(model: PrefixGroupedGPT, device: torch.device) -> None:
    MegatronSource(model).sample(Request.each(PROMPTS, 1, SamplingParams(NEW_TOKENS, (2,), use_greedy=True)))


PLAIN = GrpoTerms(kl_penalty=0.05, entropy_bonus=0.01)
EP = {"world": 2, "sizes": ParallelSizes(expert=2)}
CP = {"world": 2, "sizes": ParallelSizes(context=2)}
TP = {"world": 2, "sizes": ParallelSizes(tensor=2)}
KERNELS = ("torch_flash", "flash_attn_2", "flash_attn_3", "blockwise")

STEPS: dict[str, Step] = {
    "sft": Step(sft, UPDATE),
    "sft, selective recompute": Step(sft, UPDATE, {"activations_checkpoint_granularity": "selective"}),
    "sft, full recompute": Step(sft, UPDATE, {"activations_checkpoint_granularity": "full"}),
    "sft, layers' inputs on the host": Step(
        sft,
        UPDATE | {(INPUTS, "copy"): 4},
        {"activations_checkpoint_granularity": "full", "activation_offload": True},
    ),
    "sft, one call": Step(sft, UPDATE, {"attention_plan": "one_call"}),
    "sft, windows": Step(sft, UPDATE, WINDOW),
    "sft, softcap": Step(sft, UPDATE, {"attn_logit_softcapping": 30.0}),
    **{f"grpo, {name}": Step(grpo(PLAIN), UPDATE, {"attention_kernel": name}) for name in KERNELS},
    "grpo, full recompute": Step(grpo(PLAIN), UPDATE, {"activations_checkpoint_granularity": "full"}),
    "grpo, sinks": Step(grpo(PLAIN), UPDATE, SINKS),
    "grpo, cp, sinks": Step(grpo(PLAIN), UPDATE, SINKS | {"cp_comm_type": "a2a"}, rank=1, **CP),
    "sample, sinks": Step(sample_pages, PAGES, SINKS | WINDOW | {"window_size": [40, 0]}),
    "grpo, latent": Step(grpo(PLAIN), UPDATE, LATENT_ROWS),
    "grpo, cp, latent": Step(grpo(PLAIN), UPDATE, LATENT_ROWS, rank=1, **CP),
    "sample, latent": Step(sample_pages, PAGES, LATENT_ROWS),
    "grpo, lora on latent": Step(grpo(PLAIN), UPDATE, LATENT_LORA),
    "sample, lora on latent": Step(sample_pages, PAGES, LATENT_LORA),
    "grpo, experts": Step(grpo(PLAIN), UPDATE | dispatched(3), EXPERTS),
    "grpo, experts, full recompute": Step(
        grpo(PLAIN), UPDATE | dispatched(4), EXPERTS | {"activations_checkpoint_granularity": "full"}
    ),
    "grpo, ep": Step(grpo(PLAIN), UPDATE | dispatched(3, 5) | {(STREAMS, "value"): 3}, EXPERTS, rank=1, **EP),
    "grpo, tp, experts": Step(
        grpo(PLAIN), UPDATE | dispatched(3, 5), EXPERTS | {"sequence_parallel": True}, rank=1, **TP
    ),
    "grpo, cp, experts": Step(grpo(PLAIN), UPDATE | dispatched(3), EXPERTS, rank=1, **CP),
    "sft, experts of DeepSeek": Step(sft, UPDATE | dispatched(1) | {(TOKENS, "value"): 1}, DEEPSEEK),
    "sft, experts of gpt-oss": Step(sft, UPDATE | dispatched(2), GPT_OSS),
    "grpo, ep, tp": Step(
        grpo(PLAIN),
        UPDATE | dispatched(3, 5) | {(STREAMS, "value"): 3},
        EXPERTS | {"sequence_parallel": True, "expert_tensor_parallel_size": 1},
        2,
        1,
        ParallelSizes(tensor=2, expert=2, expert_tensor=1),
    ),
    "sft, other keys": Step(sft, UPDATE, OTHER_KEYS),
    "sft, longrope": Step(sft, UPDATE, LONG),
    "sft, uneven stage": Step(
        sft_stage,
        STAGE,
        {"num_layers": 3, "num_layers_in_first_pipeline_stage": 1, "num_layers_in_last_pipeline_stage": 2},
        2,
        0,
        ParallelSizes(pipeline=2),
    ),
    "sample, experts": Step(sample, SAMPLE | sampled(6), EXPERTS),
    "grpo, tree": Step(grpo(PLAIN, "sequence", min_shared=1), UPDATE),
    "grpo, k2": Step(grpo(GrpoTerms(kl_penalty=0.05, kl_type="k2")), UPDATE),
    "grpo, k1 in reward": Step(grpo(GrpoTerms(kl_penalty=0.05, kl_type="k1", kl_in_reward=True)), UPDATE),
    "grpo, weighted k3": Step(grpo(GrpoTerms(kl_penalty=0.05, kl_weighted=True)), UPDATE),
    "objectives": Step(objectives, {}),
    "advantages": Step(advantages, {}),
    "lftf": Step(lftf, UPDATE),
    "sft, unsharded Adam": Step(partial(sft, name="adam"), UPDATE),
    "sft, data-parallel": Step(sft, UPDATE, rank=1, world=2),
    "films": Step(films, UPDATE, FILMS),
    "films, cp": Step(films, UPDATE, FILMS, rank=1, **CP),
    "films, tp": Step(films, UPDATE, FILMS | {"sequence_parallel": True}, rank=1, **TP),
    "films, connector alone": Step(films, UPDATE, FILMS | {"freeze_language_model": True}),
    "clip": Step(pictures, TWICE, TOWERS["clip"] | EYES),
    "siglip, frozen": Step(pictures, TWICE | {(SEEN, "copy"): 1}, TOWERS["siglip"]),
    "siglip, tower alone": Step(
        pictures, TWICE, TOWERS["siglip"] | EYES | {"freeze_language_model": True, "freeze_vision_projection": True}
    ),
    "onevision": Step(tiles, TWICE, TOWERS["onevision"] | EYES),
    "llava_next": Step(images, TWICE, TOWERS["llava_next"] | EYES),
    "qwen2_vl": Step(patches, TWICE | asked(copy=16, shape=2), TOWERS["qwen2_vl"] | EYES),
    "qwen2_5_vl": Step(
        patches, TWICE | asked(copy=24, shape=4, index=8) | {(BACKWARD, "index"): 4}, TOWERS["qwen2_5_vl"] | EYES
    ),
    "qwen3_vl": Step(patches, TWICE | asked(copy=28, shape=8, value=2), TOWERS["qwen3_vl"] | EYES),
    "qwen3_vl, frozen, full recompute": Step(
        patches,
        TWICE | asked(copy=28, shape=8, value=2) | {(SEEN, "copy"): 2},
        TOWERS["qwen3_vl"] | {"activations_checkpoint_granularity": "full"},
    ),
    # This rank has no rows of media.
    "qwen3_vl, frozen, tp": Step(
        patches,
        TWICE | asked(copy=14, shape=4, value=1) | {(SEEN, "copy"): 1, (SPREAD, "copy"): 2},
        TOWERS["qwen3_vl"] | {"sequence_parallel": True},
        rank=1,
        **TP,
    ),
    **{
        f"sample, stage {rank}": Step(sample, LANES, rank=rank, world=2, sizes=ParallelSizes(pipeline=2))
        for rank in (0, 1)
    },
    "sft, moments on the host": Step(
        partial(sft, optimizer_cpu_offload=True), UPDATE | {(HOST_STEP, "copy"): 2 * PARAMETERS}
    ),
    "sft, moments in bf16": Step(partial(sft, exp_avg_dtype="bfloat16", exp_avg_sq_dtype="bfloat16"), UPDATE),
    "sft, half of them on the host": Step(
        partial(sft, name="adam", optimizer_cpu_offload=True, optimizer_offload_fraction=0.5, exp_avg_dtype="bfloat16"),
        UPDATE | {(HOST_STEP, "copy"): 2 * PARAMETERS},
    ),
    "sft, gradients summed meanwhile": Step(partial(sft, overlap_grad_reduce=True), UPDATE),
    "grpo, weights gathered meanwhile": Step(
        grpo(PLAIN, overlap_grad_reduce=True, overlap_param_gather=True), UPDATE, rank=1, world=2
    ),
    "grpo, reference on the host": Step(grpo(PLAIN, on_host=True), UPDATE | {(KEPT, "copy"): PARAMETERS}),
    **{
        f"sft, stage {rank}": Step(sft_stage, STAGE, rank=rank, world=2, sizes=ParallelSizes(pipeline=2))
        for rank in (0, 1)
    },
    **{
        f"sft, stage {rank} in pieces": Step(
            sft_stage,
            PIECES,
            {"num_layers": 4, "virtual_pipeline_model_parallel_size": 2},
            rank=rank,
            world=2,
            sizes=ParallelSizes(pipeline=2),
        )
        for rank in (0, 1)
    },
    "sample": Step(sample, SAMPLE),
    "sample, windows": Step(sample, SAMPLE, WINDOW),
    "greedy": Step(greedy, SAMPLE),
    **{f"sample, {name}": Step(sample_pages, PAGES, {"attention_kernel": name}) for name in KERNELS},
    "sample, pages and windows": Step(sample_pages, PAGES, WINDOW | {"window_size": [40, 0]}),
    **{
        f"grpo, cp {comm}, rank {rank}": Step(grpo(PLAIN), UPDATE, {"cp_comm_type": comm}, rank=rank, **CP)
        for comm in ("all_gather", "a2a")
        for rank in (0, 1)
    },
    "grpo, cp, windows": Step(grpo(PLAIN), UPDATE, WINDOW, rank=1, **CP),
    "grpo, tp": Step(grpo(PLAIN), UPDATE, {"sequence_parallel": True}, rank=1, **TP),
    "grpo, adapters": Step(grpo(PLAIN), UPDATE, LORA | {"activations_checkpoint_granularity": "full"}),
    "grpo, adapters, tp": Step(grpo(PLAIN), UPDATE, LORA | {"sequence_parallel": True}, rank=1, **TP),
    "lftf, adapters": Step(lftf, UPDATE, LORA),
    "sample, adapters": Step(sample, SAMPLE, LORA, rank=1, **TP),
    "sample, tp": Step(sample, SAMPLE, {"sequence_parallel": True}, rank=1, **TP),
}


def take(step: Step) -> DryRun:
    """Take the step, and say what was seen.

    Raises:
        Fault: what a GPU would not like.
    """
    with pretended_gpu() as device:
        pretend(step.rank, step.world, step.sizes)
        model = build_gpt(step.config, device)
        assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())
        with DryRun(STREAM_SHAPE) as run:
            step.take(model, device)
    return run


def steps(device: torch.device, names: list[str]) -> list[dict[str, Any]]:
    """Of each step of these names what the host read, which operations ran, and in which functions."""
    found = []
    for name in names:
        run = take(STEPS[name])
        found.append({"reads": dict(run.reads), "operations": dict(run.operations), "places": run.places})
    be_alone()
    return found
