"""Impossible values are refused, and the page that lists the keys is up to date."""

import re
import subprocess
import sys

import pytest

from megatron_ext.errors import UserError
from megatron_ext.rollouts import SamplingParams
from megatron_ext.vllm_servers import VllmOptions
from recipes.bias.settings import LFTFData
from recipes.cli.compose import compose, forced
from recipes.cli.config import build
from recipes.grpo.settings import GRPOConfig, GRPOData
from recipes.run.settings import CheckpointCallbackSection
from recipes.sft.settings import SFTConfig, SFTData
from tests.recipe_runs import ROOT


def test_the_reference_page_is_up_to_date():
    done = subprocess.run(
        [sys.executable, "tools/config_reference.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.min_shared_tokens=0", "min_shared_tokens=0 must be at least 1"),
        ("model.prefix_grouping=maybe", "prefix_grouping must be auto, true or false, got 'maybe'"),
        ("trainer.grpo.samples_per_prompt=1", "samples_per_prompt=1: a response is compared"),
        ("trainer.grpo.sampling_params.use_greedy=true", "use_greedy=true makes all responses"),
        ("trainer.grpo.sampling_params.temperature=0", "temperature must be positive"),
        ("trainer.grpo.sampling_params.top_p=0", "top_p must lie in"),
        ("++trainer.grpo.sampling_params.min_p=1", "trainer.grpo.sampling_params / length_params: min_p must lie in"),
        ("++trainer.grpo.sampling_params.repetition_penalty=0", "repetition_penalty must be positive"),
        ("++trainer.grpo.sampling_params.stop_token_ids=[-3]", "stop_token_ids are ids of tokens, 0 or more"),
        ("++trainer.grpo.sampling_params.stop_strings=[a,'']", "stop_strings must not be empty"),
        (
            "++trainer.grpo.validation_sampling_params.temperature=0.6",
            "validation_sampling_params.temperature=0.6 does nothing beside use_greedy=true",
        ),
        ("trainer.grpo.length_params.max_length=0", "max_new_tokens must be at least 1"),
        ("++trainer.grpo.rollout_tokens=-1", "rollout_tokens=-1 must be at least 1"),
        ("++trainer.grpo.rollout_tokens=50", "rollout_tokens=50 is less than"),
        ("++trainer.grpo.max_staleness=-1", "max_staleness=-1 must be at least 0"),
        ("++trainer.grpo.max_staleness=1", "max_staleness=1 is for servers, which have weights of their own"),
        ("++trainer.grpo.rollout_micro_batch_size=4", "is no more: set trainer.grpo.rollout_tokens"),
        ("++trainer.grpo.rollout.source=vlm", "rollout.source must be megatron, vllm or file, got 'vlm'"),
        (
            "++trainer.grpo.rollout.start=1",
            "rollout.start is for servers, and trainer.grpo.rollout.source=megatron has none",
        ),
        ("++trainer.grpo.rollout.urls=['http://a:1']", "rollout.urls is for servers"),
        ("++trainer.grpo.rollout.source=vllm", "trainer.grpo.rollout: give either urls, of servers that run, or start"),
        ("trainer.grpo.initial_policy_kl_penalty=-0.1", "initial_policy_kl_penalty=-0.1 must be at least 0"),
        (
            "trainer.grpo.reference_policy_kl_type=k1",
            "trainer.grpo: reference_policy_kl_type=k1 in the loss has no effect",
        ),
        ("++trainer.grpo.use_kl_in_reward=true", "use_kl_in_reward=true needs reference_policy_kl_type=k1, got k3"),
        ("trainer.grpo.ratio_eps=-0.1", "trainer.grpo.objective: grpo: ratio_clip_min=-0.1 must lie in [0, 1)"),
        ("++trainer.grpo.high_entropy_share=0", "trainer.grpo.high_entropy_share=0.0 must lie in (0, 1]"),
        ("trainer.grpo.objective=gppo", "trainer.grpo.objective: unknown objective gppo; did you mean "),
        ("trainer.grpo.save_interval=-1", "save_interval=-1 must be at least 0"),
        ("model.micro_batch_size=0", "model.micro_batch_size=0 must be at least 1"),
        ("model.global_batch_size=0", "model.global_batch_size=0 must be at least 1"),
        ("model.seed=-1", "model.seed=-1 must be at least 0"),
        ("model.num_attention_heads=0", "model.num_attention_heads=0 must be at least 1"),
        ("model.num_layers=0", "model.num_layers=0 must be at least 1"),
        ("++model.kv_channels=5", "model.kv_channels=5 must be even"),
        ("++model.logprob_chunk_size=0", "model.logprob_chunk_size=0 must be at least 1"),
        ("model.optim.lr=1e-9", None),
        ("model.optim.sched.name=cosine", "model.optim.sched.name must be one of"),
        ("++exp_manager.resume_ignore_no_checkpoint=true", "unknown key exp_manager.resume_ignore_no_checkpoint"),
        ("++exp_manager.create_wandb_logger=true", "needs exp_manager.wandb_logger_kwargs={name: ..., project: ...}"),
        ("++exp_manager.checkpoint_callback_params.mode=low", "mode must be min or max, got 'low'"),
        (
            "++exp_manager.checkpoint_callback_params.monitor=val/score",
            "monitor=val/score: which of its values are better?",
        ),
        ("++exp_manager.checkpoint_callback_params.save_top_k=-2", "save_top_k=-2 must be at least -1"),
    ],
)
def test_impossible_values_are_refused_before_anything_runs(override, words):
    if words is None:
        assert build_grpo(override).model.optim.lr == 1e-9
        return
    with pytest.raises(ValueError) as caught:
        build_grpo(override)
    assert words in str(caught.value)


def test_every_key_of_sampling_reaches_the_sampler():
    keys = ["top_k=4", "top_p=0.5", "min_p=0.1", "repetition_penalty=1.3", "stop_token_ids=[7,9]", "stop_strings=[b]"]
    grpo = build_grpo(*(f"++trainer.grpo.sampling_params.{key}" for key in keys)).trainer.grpo
    length = grpo.length_params.max_length
    assert grpo.sampling((2, 7)) == SamplingParams(
        length, (2, 7, 9), ("b",), False, False, grpo.sampling_params.temperature, 4, 0.5, 0.1, 1.3
    )
    assert grpo.validation_sampling((2,)) == SamplingParams(length, (2,), use_greedy=True)
    keys = ["use_greedy=false", "temperature=0.6", "ignore_eos=true"]
    grpo = build_grpo(*(f"++trainer.grpo.validation_sampling_params.{key}" for key in keys)).trainer.grpo
    assert grpo.validation_sampling((2,)) == SamplingParams(length, (2,), ignore_eos=True, temperature=0.6)


VLLM = ["++trainer.grpo.rollout.source=vllm", "++trainer.grpo.rollout.start=2"]


def test_every_key_of_servers_reaches_them():
    keys = ["python=/p", "host=10.0.0.1", "cuda_devices=['6','7']", "arguments=[--x]", "weights_dir=/w"]
    keys += ["timeout=1", "patience=2", "max_restarts=7", "tolerance=0.5", "in_flight=abort"]
    rollout = build_grpo(*VLLM, *(f"++trainer.grpo.rollout.{key}" for key in keys)).trainer.grpo.rollout
    assert rollout.options == VllmOptions(
        start=2, python="/p", host="10.0.0.1", cuda_devices=("6", "7"), arguments=("--x",), weights_dir="/w", timeout=1.0,
        patience=2.0, max_restarts=7, tolerance=0.5, in_flight="abort",
    )  # fmt: skip
    assert build_grpo(*VLLM).trainer.grpo.rollout.options == VllmOptions(start=2)
    sent = ["++trainer.grpo.rollout.weights=nccl", "++trainer.grpo.rollout.cuda_devices=['6','7']"]
    far = ["trainer.num_nodes=2", "++trainer.grpo.rollout.host=10.0.0.1"]
    options = build_grpo(*VLLM, *sent, *far).trainer.grpo.rollout.options
    assert options == VllmOptions(start=2, weights="nccl", cuda_devices=("6", "7"), host="10.0.0.1")


def test_what_our_own_sampler_holds_is_no_matter_where_servers_sample():
    """`grpo.yaml` sets it: who wants servers need not take it back."""
    assert build_grpo(*VLLM, "++trainer.grpo.rollout_tokens=9999").trainer.grpo.rollout.source == "vllm"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trainer.num_nodes=2"], "rollout.host=127.0.0.1 is reached from its own node alone, and trainer.num_nodes=2"),
        (["trainer.num_nodes=2", "++trainer.grpo.rollout.host=10.0.0.1"], "rollout.weights_dir is not set, and"),
        (["++trainer.grpo.rollout.weights=nccl"], "name the servers' own in trainer.grpo.rollout.cuda_devices"),
        (["++trainer.grpo.rollout.urls=['http://127.0.0.1:1']"], "trainer.grpo.rollout: give either urls"),
    ],
)
def test_servers_that_ranks_cannot_reach_are_refused(overrides, words):
    with pytest.raises(UserError, match=re.escape(words)):
        build_grpo(*VLLM, *overrides)


@pytest.mark.parametrize(
    ("monitor", "mode"),
    [
        ("val/loss", "min"), ("val/perplexity", "min"), ("val/afgb", "min"), ("val_rollouts/reward", "max"),
        ("val/pronoun_mass", "max"),
    ],
)  # fmt: skip
def test_a_metrics_name_says_which_of_its_values_are_better(monitor, mode):
    """NeMo's min by default would link `best` to the lowest reward."""
    assert (
        CheckpointCallbackSection(monitor=monitor).mode
        == CheckpointCallbackSection(monitor=monitor, mode=mode).mode
        == mode
    )
    other = {"min": "max", "max": "min"}[mode]
    with pytest.raises(
        UserError, match=f"mode={other} would keep the worst by monitor={monitor}; set mode={mode}, or leave"
    ):
        CheckpointCallbackSection(monitor=monitor, mode=other)
    assert CheckpointCallbackSection(monitor="val/score", mode=other).mode == other


@pytest.mark.parametrize(
    ("cls", "trained", "held_out"),
    [
        (SFTData, "train_path", "validation_path"),
        (GRPOData, "train_path", "validation_path"),
        (LFTFData, "text_path", "validation_text_path"),
    ],
)
def test_what_is_trained_on_is_not_held_out(tmp_path, cls, trained, held_out):
    """Also by another way to the same file; files need not be there yet."""
    (tmp_path / "rows.jsonl").write_text("")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "rows.jsonl")
    for one, other in (
        ("rows.jsonl", "rows.jsonl"),
        ("rows.jsonl", "link.jsonl"),
        ("none", "../" + tmp_path.name + "/none"),
    ):
        paths = {trained: str(tmp_path / one), held_out: str(tmp_path / other)}
        with pytest.raises(
            UserError, match=f"data.{trained} and data.{held_out} are the same file, .* data.{held_out}=null"
        ):
            cls(**paths)
    cls(**{trained: "a", held_out: "b"})
    cls(**{trained: "a", held_out: None})


def build_grpo(*overrides: str) -> GRPOConfig:
    given = ["data.train_path=x", "pretrained_checkpoint.restore_from_path=z", *overrides]
    return build(GRPOConfig, compose("grpo_tiny", forced(given)))


@pytest.mark.parametrize(
    ("kind", "key", "field"),
    [("k1", "use_kl_in_reward", "kl_in_reward"), ("k3", "use_bias_correction_kl", "kl_weighted")],
)
def test_forms_of_the_kl_penalty_reach_the_loss(kind, key, field):
    chosen = f"trainer.grpo.reference_policy_kl_type={kind}", f"++trainer.grpo.{key}=true"
    terms = build_grpo(*chosen, "trainer.grpo.initial_policy_kl_penalty=0.25").trainer.grpo.terms
    assert getattr(terms, field) and terms.kl_type == kind and terms.kl_penalty == 0.25
    with pytest.raises(ValueError, match=f"{key}=true has no effect while initial_policy_kl_penalty=0"):
        build_grpo(*chosen, "trainer.grpo.initial_policy_kl_penalty=0")


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        ([], None),
        (["trainer.grpo.reference_policy_kl_type=k1", "++trainer.grpo.use_kl_in_reward=true"], None),
        (["++trainer.grpo.off_policy={level: sequence}"], None),
        (
            ["trainer.grpo.num_prompts_per_grpo_step=64"],
            r"2 optimizer steps follow a batch \(trainer.grpo.num_prompts_per_grpo_step=64, and model.global_batch_size=512 "
            r"takes 32 prompts\)",
        ),
        (["++trainer.grpo.high_entropy_share=0.2"], "trainer.grpo.high_entropy_share=0.2 asks for the entropies of all"),
        (["++trainer.grpo.off_policy={reject_above: 2}"], "trainer.grpo.off_policy.reject_above=2.0 leaves out responses"),
    ],
)  # fmt: skip
def test_a_pass_before_the_update_has_a_reason(overrides, why):
    found = build_grpo(*overrides).why_old_pass
    assert found is None if why is None else re.match(why, found)


def test_beginnings_cannot_be_shared_without_sharing():
    with pytest.raises(
        ValueError, match="min_shared_tokens=4 shares beginnings, model.prefix_grouping=false shares nothing"
    ):
        build_grpo("model.prefix_grouping=false", "model.min_shared_tokens=4")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["++data.train_on_turns=first"], "data.train_on_turns must be last or all, got 'first'"),
        (
            ["++data.train_on_turns=all"],
            "model.loss_on_prompt=true learns every token, data.train_on_turns=all the assist",
        ),
        (["++data.chat_template_kwargs=[1]"], "data.chat_template_kwargs must be a mapping"),
        (["++data.ignored_keys=system"], "data.ignored_keys must be a list of str"),
        (["++data.train_on_turn=all"], "unknown key data.train_on_turn; did you mean data.train_on_turns?"),
    ],
)
def test_impossible_data_of_fine_tuning_is_refused(overrides, words):
    given = ["data.train_path=x", "model.tokenizer=x", "model.encoder_seq_length=64"]
    with pytest.raises(ValueError, match=words):
        build(SFTConfig, compose("sft_tiny", [*given, *overrides]))


def test_turns_variables_and_ignored_keys_are_read():
    given = ["data.train_path=x", "model.tokenizer=x", "model.loss_on_prompt=false", "++data.train_on_turns=all"]
    given += ["++data.chat_template_kwargs={enable_thinking: false}", "++data.ignored_keys=[name, messages.name]"]
    data = build(SFTConfig, compose("sft_tiny", given)).data
    assert (data.train_on_turns, data.chat_template_kwargs) == ("all", {"enable_thinking": False})
    assert data.ignored_keys == ["name", "messages.name"]


def test_a_reference_on_the_host_needs_a_reference():
    host = "++trainer.grpo.offload_reference_policy=true"
    assert build_grpo(host).trainer.grpo.offload_reference_policy
    with pytest.raises(
        ValueError, match="offload_reference_policy=true, but .*initial_policy_kl_penalty=0 has no reference"
    ):
        build_grpo(host, "trainer.grpo.initial_policy_kl_penalty=0")
