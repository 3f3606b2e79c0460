"""From YAML to a job, and the vocabulary of a model that has more rows than its tokenizer has tokens."""

from __future__ import annotations

import pytest

from megatron_ext.planner import estimate
from recipes.cli.config import ConfigError, build
from recipes.planning import job_of, read_config
from recipes.run.inputs import Inputs
from recipes.sft.settings import SFTConfig
from tests.data_cases import write_words


def test_a_grpo_step_is_read_whole():
    config = read_config("grpo.yaml", ["model=qwen3_8b", "cluster=2x8", "trainer.grpo.num_prompts_per_grpo_step=192"])
    job = job_of(config)
    assert (job.nodes, job.devices, job.groups, job.updates, job.samples) == (2, 8, 64, 3, 16)
    assert (job.prompt, job.response, job.stream_tokens, job.groups_per_stream) == (2048, 2048, 16384, None)
    assert job.rollout and job.reference_copy and job.scoring_passes == 2 and job.share_prefix
    assert job.model.precision == "bf16" and job.model.vocab_size == 151936
    quiet = job_of(
        read_config("grpo", ["trainer.grpo.initial_policy_kl_penalty=0", "model.prefix_grouping=false"]), 7, 9
    )
    assert (quiet.reference_copy, quiet.scoring_passes, quiet.share_prefix) == (False, 1, False)
    assert (quiet.prompt, quiet.response) == (7, 9)
    served = job_of(
        read_config("grpo", ["+trainer.grpo.rollout={source: vllm, start: 1, host: 10.0.0.5, weights_dir: /w}"])
    )
    assert not served.rollout and estimate(served).step.sampling == 0
    assert (
        sum(stage.cache for stage in estimate(served).stages) == 0 < sum(stage.cache for stage in estimate(job).stages)
    )
    for penalty, passes in ((0, 0), (0.01, 1)):  # an update's own pass says the old log-probabilities
        once = ["trainer.grpo.num_prompts_per_grpo_step=64", f"trainer.grpo.initial_policy_kl_penalty={penalty}"]
        assert job_of(read_config("grpo", once)).scoring_passes == passes


def test_sft_and_lftf_are_read_whole():
    sft = job_of(read_config("sft", ["model.optim.name=adam"]))
    assert (sft.groups, sft.groups_per_stream, sft.response, sft.blocks) == (128, 1, 4096, 0)
    assert not sft.distributed_optimizer and not sft.rollout
    assert job_of(read_config("sft"), 100, 28).response == 128
    with pytest.raises(ConfigError, match="beside prompt=100 give response, too"):
        job_of(read_config("sft"), 100)
    lftf = job_of(read_config("lftf", []))
    assert lftf.blocks == 1 and lftf.locates and lftf.groups == 128
    assert not job_of(read_config("lftf", ["trainer.lftf.block=3"])).locates
    assert not job_of(read_config("lftf", ["trainer.lftf.block=all"])).blocks
    places = "[{block: 3, part: attention},{block: 3, part: mlp},{block: 5, heads: [0, 1]}]"
    assert job_of(read_config("lftf", [f"trainer.lftf.block={places}"])).blocks == 2
    chosen = job_of(read_config("lftf", ["trainer.lftf.places=heads", "trainer.lftf.num_places=3"]))
    assert chosen.blocks == 3 and chosen.locates


@pytest.mark.parametrize("recipe", ["sft", "grpo", "lftf"])
def test_lengths_that_cannot_be_are_refused(recipe):
    """Also where their sum would be a length."""
    config = read_config(recipe)
    for prompt, response, words in (
        (-5, 7, r"^prompt=-5 \(tools/plan.py: --prompt\) must be at least 0$"),
        (7, 0, r"^response=0 \(tools/plan.py: --response\) must be at least 1$"),
        (7, -2, r"^response=-2 \(tools/plan.py: --response\) must be at least 1$"),
    ):
        with pytest.raises(ConfigError, match=words):
            job_of(config, prompt, response)
    assert job_of(config, 0, 1).response == 1


@pytest.mark.parametrize(("nodes", "pipeline"), [(1, 1), (2, 2), (3, 2), (4, 2), (16, 2), (64, 2)])
def test_nodes_choose_a_layout(nodes, pipeline):
    config = read_config("lftf", ["model=llama3_1_70b"], nodes)
    assert (config.trainer.num_nodes, config.model.pipeline_model_parallel_size) == (nodes, pipeline)
    stays = read_config("lftf", ["model=llama3_1_70b", "cluster=1x8"], nodes)
    assert (stays.trainer.num_nodes, stays.model.pipeline_model_parallel_size) == (nodes, 1)
    assert read_config("sft_tiny", nodes=nodes).trainer.num_nodes == nodes


def test_a_tiny_yaml_needs_a_vocabulary():
    with pytest.raises(ValueError, match="model.vocab_size is not set: the planner reads no tokenizer"):
        job_of(read_config("grpo_tiny"))
    assert job_of(read_config("grpo_tiny", ["model.vocab_size=300"])).model.padded_vocab_size == 304


def test_what_trains_nothing_is_refused():
    with pytest.raises(ConfigError, match="eval_bias has none of trainer.sft, trainer.grpo, trainer.lftf"):
        read_config("eval_bias")
    with pytest.raises(ConfigError, match="unknown key model.hiden_size; did you mean model.hidden_size"):
        read_config("sft", ["model.hiden_size=3"])


def inputs(tmp_path, vocabulary: int | None) -> Inputs:
    words = {word: number for number, word in enumerate(["?", "a", "b", "c"])}
    folder = tmp_path / "words"
    if not folder.exists():
        write_words(folder, words)
    node = {
        "trainer": {"sft": {"max_steps": 1}},
        "model": {
            "num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "ffn_hidden_size": 8, "tokenizer": str(folder),
            "vocab_size": vocabulary,
        },
        "data": {"train_path": "x"},
        "exp_manager": {"explicit_log_dir": str(tmp_path / "run")},
    }  # fmt: skip
    return Inputs.check(build(SFTConfig, node))


def test_a_models_own_vocabulary_size_is_respected(tmp_path):
    """Five tokens, </s> among them: as many rows where nothing is said, more where the YAML says so, never fewer."""
    tokens = inputs(tmp_path, None).tokenizer.vocab_size
    assert inputs(tmp_path, None).config.model.vocab_size == tokens == 5
    for rows in (tokens, tokens + 1, 152064):
        assert inputs(tmp_path, rows).config.model.vocab_size == rows
    with pytest.raises(ValueError, match=f"model.vocab_size={tokens - 1} is less than the {tokens} tokens of"):
        inputs(tmp_path, tokens - 1)


def test_grpo_of_70_billion_parameters_fits_two_nodes_with_the_host():
    """What the planner says is missing, and that it then fits."""
    two = ["model=llama3_1_70b", "cluster=2x8"]
    plain = estimate(job_of(read_config("grpo", two)))
    assert not plain.fits
    _, said = plain.reason.removesuffix(", with which it fits").split(", or ")
    moved = [estimate(job_of(read_config("grpo", [*two, *keys.split(" and ")]))) for keys in said.split(" or ")]
    assert all(found.fits for found in moved) and moved[0].fullest.host > 0
    both = ["trainer.grpo.offload_reference_policy=true", "model.optim.optimizer_cpu_offload=true"]
    job = job_of(read_config("grpo", [*two, *both, "model.optim.overlap_grad_reduce=true"]))
    assert job.reference_on_host and job.moments.on_host == 1 and job.overlap_grad_reduce and estimate(job).fits
    sft = estimate(job_of(read_config("sft", [*two, "model.optim.optimizer_cpu_offload=true"])))
    assert sft.fits
