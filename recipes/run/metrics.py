"""Every number that a run logs, in one table: docs/metrics.md is written from it, and a number that it lacks is not logged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

__all__ = ["METRICS", "REST", "WHOLE", "Metric", "in_order", "key_of", "seconds_of", "unknown_metrics"]

WHOLE = "timers/step"
REST = "the rest"
# In `timers/step` or in another of its timers are all but these.
APART = (WHOLE, "timers/validation")
# A timer whose seconds are in those of another one, too.
WITHIN = {"timers/weights": "timers/generate"}


@dataclass(frozen=True)
class Metric:
    """
    Attributes:
        recipes: who writes it.
        unit: of the number.
        meaning: what it says, and when to look at it.
    """

    recipes: str
    unit: str
    meaning: str


METRICS = {
    "train_rollouts/reward": Metric("GRPO", "reward", "Mean over all responses sampled in this step."),
    "train_rollouts/reward/*": Metric(
        "GRPO, with trainer.grpo.rewards",
        "reward",
        "Of each reward by its name, before its weight: mean over the responses whose rows it scores.",
    ),
    "train_rollouts/reward_timeouts": Metric(
        "GRPO, with trainer.grpo.on_reward_timeout",
        "share",
        "Responses that a reward did not score in time. Not 0: mend the reward, or raise trainer.grpo.reward_timeout.",
    ),
    "train_rollouts/dropped_groups": Metric(
        "GRPO, with trainer.grpo.on_reward_timeout=drop",
        "share",
        "Prompts that are not trained on, because a reward did not score one of their responses in time.",
    ),
    "train_rollouts/response_length": Metric(
        "GRPO",
        "tokens",
        "Mean length of the responses, their end token and what they observed included.",
    ),
    "train_rollouts/turns": Metric(
        "GRPO", "turns", "Mean of what a response said at a time: 1 without an environment."
    ),
    "train_rollouts/observed_length": Metric(
        "GRPO", "tokens", "Mean of what a response read of its environment, which is context and never trained."
    ),
    "train_rollouts/truncated": Metric(
        "GRPO",
        "share",
        "Responses cut off at trainer.grpo.length_params.max_length. Near 1: raise it, or see whether the model writes "
        "its end token.",
    ),
    "train_rollouts/groups_with_signal": Metric(
        "GRPO",
        "share",
        "Prompts whose responses differ in reward; the others teach nothing. Near 0: rows are too easy or too hard.",
    ),
    "train_rollouts/sampling_rounds": Metric(
        "GRPO, with trainer.grpo.max_sampling_rounds", "rounds", "Times that the step has sampled prompts."
    ),
    "train_rollouts/thrown_away": Metric(
        "GRPO, with trainer.grpo.max_sampling_rounds",
        "share",
        "Groups of all rounds that are not trained: without signal, or more than the step takes. The reward and the groups with "
        "signal are of all rounds, too.",
    ),
    "train_optim/sampler_logprob_diff": Metric(
        "GRPO",
        "nats",
        "Mean |trainer - sampler| log-probability over trained tokens, both of the weights that sampled. Rounding, unless "
        "sampling has filters or a penalty: in fp32 about 1e-6. 0 where a file does not say it. Where it grows, the sampler "
        "does not sample what is trained.",
    ),
    "train_optim/sampler_logprob_diff_max": Metric(
        "GRPO", "nats", "The largest |trainer - sampler| of the trained tokens."
    ),
    "train_optim/sampler_kl": Metric("GRPO", "nats a token", "Estimate of KL(sampler, trainer), never negative."),
    "train_optim/importance": Metric(
        "GRPO, with trainer.grpo.off_policy", "none", "Mean of exp(trainer - sampler) before it is bounded; near 1."
    ),
    "train_optim/importance_bounded": Metric(
        "GRPO, with trainer.grpo.off_policy", "share", "Trained tokens whose weight was bounded, or made 0 by mask."
    ),
    "train_optim/effective_samples": Metric(
        "GRPO, with trainer.grpo.off_policy",
        "share",
        "Effective sample size of the tokens over their number, by the weights before they are bounded: 1 where all are alike.",
    ),
    "train_rollouts/staleness": Metric(
        "GRPO, with trainer.grpo.max_staleness",
        "steps",
        "How many steps older than those that are trained the weights were that sampled, over all sampled tokens.",
    ),
    "train_rollouts/staleness_max": Metric(
        "GRPO, with trainer.grpo.max_staleness", "steps", "Of the oldest token; at most trainer.grpo.max_staleness."
    ),
    "train_rollouts/mixed_weights": Metric(
        "GRPO, with trainer.grpo.max_staleness",
        "share",
        "Responses whose tokens were sampled by weights of several steps.",
    ),
    "train_rollouts/rejected": Metric(
        "GRPO, with trainer.grpo.off_policy.reject_above", "share", "Responses left out of the update."
    ),
    "train_optim/loss": Metric(
        "SFT, GRPO, LFTF",
        "nats a token in SFT, else none",
        "What the step minimised. In GRPO its level says little: advantages sum to about zero.",
    ),
    "train_optim/grad_norm": Metric(
        "SFT, GRPO, LFTF",
        "none",
        "Norm of the gradient over all parameters, before clipping at gradient_clip_val; in GRPO the mean of updates.",
    ),
    "train_optim/skipped": Metric(
        "SFT, GRPO, LFTF",
        "share",
        "Optimizer steps left out, because their gradient was not finite or above trainer.health.skip_above. Numbers that were "
        "not finite are then missing.",
    ),
    "train_optim/lr": Metric(
        "SFT, GRPO, LFTF", "none", "Learning rate of the step; in GRPO the mean over its updates."
    ),
    "train_optim/expert_load_max": Metric(
        "SFT, GRPO, LFTF, with model.num_moe_experts",
        "none",
        "Tokens of the busiest expert of any layer that runs (LFTF that keeps inputs runs none below its block), over the "
        "mean of its layer's: 1 where all have equally many. A prompt's token counts once for each response. Rising: raise "
        "model.moe_aux_loss_coeff or model.moe_router_bias_update_rate.",
    ),
    "train_optim/balance_loss": Metric(
        "SFT, GRPO, LFTF, with model.num_moe_experts",
        "none",
        "The auxiliary loss of all layers, with model.moe_aux_loss_coeff; it is no part of the loss.",
    ),
    "train_optim/entropy": Metric(
        "SFT, GRPO",
        "nats",
        "Mean entropy of the next token's distribution over trained tokens. Falls towards 0 as a policy collapses.",
    ),
    "train_optim/ratio": Metric(
        "GRPO",
        "none",
        "Mean ratio of the trained policy's probability to the sampling policy's, over updates; 1 in the first.",
    ),
    "train_optim/clip_fraction": Metric(
        "GRPO",
        "share",
        "Trained tokens, by weight, that clipping took the gradient from. High: lower model.optim.lr.",
    ),
    "train_optim/high_entropy": Metric(
        "GRPO, with trainer.grpo.high_entropy_share",
        "share",
        "Trained tokens, by weight, that the objective trains, those of the highest entropy.",
    ),
    "train_optim/kl": Metric(
        "GRPO with a KL penalty, LFTF with the loss kl",
        "nats a token",
        "Estimate of KL(policy, initial policy) on the sampled tokens, never negative, whatever form the penalty has;"
        " in LFTF of KL(initial, trained) on the text of data.text_path.",
    ),
    "train_optim/saving_kept": Metric(
        "GRPO, with model.micro_batch_tokens",
        "share",
        "Of what sharing prompts saves, what is left after groups were split over streams.",
    ),
    "train_optim/tokens_executed": Metric(
        "GRPO",
        "tokens",
        "Tokens in the passes over rollouts (sampling policy, initial one, training), padding included.",
    ),
    "train_optim/tokens_repeated": Metric(
        "GRPO",
        "tokens",
        "tokens_executed as it would be with the prompt repeated for each response.",
    ),
    "train_optim/tokens_saved": Metric(
        "GRPO, SFT",
        "share",
        "Tokens that need not be encoded as sequences share their beginnings; in GRPO 1 - tokens_executed / tokens_repeated.",
    ),
    "train_optim/tokens_per_second": Metric(
        "SFT, GRPO",
        "tokens a second",
        "In GRPO tokens_repeated / timers/step, so that runs with and without grouping compare; in SFT the tokens of the streams "
        "/ timers/optimizer_step.",
    ),
    "train_optim/mfu": Metric(
        "SFT, GRPO, on GPUs",
        "share",
        "Model FLOPs utilisation of the passes with and without gradient, sampling left out: what their products need, each "
        "shared token once and nothing recomputed, over the GPUs' peak in dense bf16 for as long.",
    ),
    "train_optim/sum": Metric("LFTF, several losses", "none", "The loss `sum` before its weight."),
    "train_optim/balanced": Metric("LFTF, several losses", "none", "The loss `balanced` before its weight."),
    "train_optim/abs_diff": Metric("LFTF, several losses", "none", "The loss `abs_diff` before its weight."),
    "train_optim/hint": Metric("LFTF, several losses", "none", "The loss `hint` before its weight."),
    "val/loss": Metric(
        "SFT", "nats a token", "Mean over the learnt tokens of data.validation_path; not taken at step 0."
    ),
    "val_rollouts/reward": Metric("GRPO", "reward", "Mean over the answers to data.validation_path."),
    "val_rollouts/reward/*": Metric("GRPO, with trainer.grpo.rewards", "reward", "Of each reward, in the same way."),
    "val_rollouts/response_length": Metric("GRPO", "tokens", "Mean length of these answers."),
    "val_rollouts/truncated": Metric("GRPO", "share", "Of these answers, those cut off at their longest length."),
    "val_rollouts/*": Metric(
        "GRPO, with data.validation_sets",
        "as above, else share",
        "The same of each set, val_rollouts/NAME/reward and so on. With several answers to a prompt also right, the share of "
        "answers whose reward is right_from or more; pass_at_k, the share of prompts of which one of k answers is right; "
        "majority_at_n, of which the answer that most of the n state is right.",
    ),
    "val/afgb": Metric(
        "LFTF", "probability", "AFGB: mean distance of P(he) from P(she) on prompts of the dev professions; 0 is fair."
    ),
    "val/pronoun_mass": Metric("LFTF", "probability", "Mean of P(he) + P(she) on the same; the guard watches it."),
    "val/perplexity": Metric("LFTF", "none", "Perplexity of data.validation_text_path; the guard watches it."),
    "timers/step": Metric("GRPO", "seconds", "The whole step, without validation."),
    "timers/generate": Metric("GRPO", "seconds", "Sampling and rewards."),
    "timers/weights": Metric(
        "GRPO", "seconds", "Of generate: giving the weights to what samples, unless a validation has just done so."
    ),
    "timers/rollout_dump": Metric("GRPO, with trainer.grpo.rollout_dump", "seconds", "Writing rollouts down."),
    "timers/old_and_reference_logprobs": Metric(
        "GRPO",
        "seconds",
        "Passes without gradient over the rollout: of the sampling policy, where the update's own pass does not do, and of the "
        "initial one.",
    ),
    "timers/actor_update": Metric("GRPO", "seconds", "Passes with gradient, and the optimizer."),
    "timers/optimizer_step": Metric("SFT, LFTF", "seconds", "Packing, passes and the optimizer."),
    "timers/validation": Metric("SFT, GRPO, LFTF", "seconds", "A validation."),
    "timers/evaluate": Metric("LFTF", "seconds", "The evaluation before training."),
    "timers/locate": Metric("LFTF", "seconds", "Ranking the blocks."),
    "timers/frozen_pass": Metric(
        "LFTF", "seconds", "The pass of the model as it was before training, which the losses need."
    ),
}


def key_of(name: str) -> str | None:
    """Under which key the table has a number; a * in it stands for a name of the user's. None: it lacks it."""
    if name in METRICS:
        return name
    keys = [key for key in METRICS if key.endswith("/*") and name.startswith(key.removesuffix("*"))]
    return max(keys, key=len, default=None)


def unknown_metrics(names: Iterable[str]) -> list[str]:
    """Names that the table lacks."""
    return sorted(name for name in set(names) if key_of(name) is None)


def in_order(names: Iterable[str]) -> list[str]:
    """In that of the table, and then what it lacks."""
    order = {key: i for i, key in enumerate(METRICS)}
    return sorted(set(names), key=lambda name: (order.get(key_of(name), len(order)), name))


def seconds_of(row: Mapping[str, float]) -> dict[str, float]:
    """Of one step by timer, none counted twice, and in a run of GRPO what no timer names."""
    found = {name: seconds for name, seconds in row.items() if name.startswith("timers/") and name not in APART}
    for inner, outer in WITHIN.items():
        if inner in found:
            found[outer] = found.get(outer, 0.0) - found[inner]
    return found | {REST: row[WHOLE] - sum(found.values())} if WHOLE in row else found
