"""A reward model: its logits are transformers' own, one text at a time."""

from __future__ import annotations

import pytest
import torch

from recipes.cli.config import ConfigError
from recipes.rewards.registry import RewardError, get_reward, score
from recipes.rewards.several import rewards_for
from tests.data_cases import EOS, QWEN2, write_tokenizer
from tests.unit.recipes.rewards.cases import prompts

WORDS = "the quick brown fox jumps over it is what".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random classifier of two labels, with a chat template."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    path = tmp_path_factory.mktemp("classifier") / "m"
    write_tokenizer(path, eos_token=EOS, chat_template=QWEN2)
    tokenizer = AutoTokenizer.from_pretrained(path)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_labels=2,
        max_position_embeddings=128, pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(path)
    return path


def draw(rng) -> str:
    count = int(torch.randint(1, 12, (1,), generator=rng))
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (count,), generator=rng))


def test_logits_are_the_models_own(folder, rng):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [
        {"prompt": draw(rng)} if i % 2 else {"messages": [{"role": "user", "content": draw(rng)}]} for i in range(7)
    ]
    texts, wanted = [draw(rng) for _ in rows], []
    for text, row in zip(texts, rows, strict=True):
        if "prompt" in row:
            ids = tokenizer(row["prompt"] + text, return_tensors="pt")["input_ids"]
        else:
            talk = [*row["messages"], {"role": "assistant", "content": text}]
            whole = tokenizer.apply_chat_template(talk, tokenize=False)
            ids = tokenizer(whole, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            wanted.append(model(input_ids=ids).logits[0].tolist())
    for label in (0, 1):
        found = score(get_reward({"name": "model", "path": str(folder), "label": label, "batch_size": 3}), texts, rows)
        assert found == pytest.approx([logits[label] for logits in wanted], abs=1e-5)
    assert len({round(x, 4) for x in found}) > 3


def test_it_is_loaded_in_the_process_that_asks(folder):
    rewards = rewards_for({"name": "model", "path": str(folder)}, {})
    try:
        scores = rewards.score([["it is", "the fox"], ["over"]], prompts({"prompt": "what"}, {"prompt": "the"}))
    finally:
        rewards.close()
    here = get_reward({"name": "model", "path": str(folder)})
    assert scores.totals[0] == pytest.approx(score(here, ["it is", "the fox"], [{"prompt": "what"}] * 2), abs=1e-5)
    assert rewards.parts[0].reward.reward._loaded.model is None


def test_each_rank_has_a_gpu_of_its_own(folder, monkeypatch):
    """Without GPUs here: where it would be put."""
    places = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, place: places.append(torch.device(place)) or self)
    monkeypatch.setenv("LOCAL_RANK", "2")
    get_reward({"name": "model", "path": str(folder)}).target.prepare()
    get_reward({"name": "model", "path": str(folder), "device": "cuda:1"}).target.prepare()
    assert places == [torch.device("cuda", 2), torch.device("cuda", 1)]


def test_what_cannot_be_scored_is_refused(folder, tmp_path):
    with pytest.raises(
        ConfigError, match=r"path=.*nowhere is no folder of a Hugging Face model: it has no config.json"
    ):
        get_reward({"name": "model", "path": str(tmp_path / "nowhere")})
    with pytest.raises(ConfigError, match="dtype=int8 must be one of"):
        get_reward({"name": "model", "path": str(folder), "dtype": "int8"})
    with pytest.raises(RewardError, match="label=2, and .* has 2 labels, counted from 0"):
        score(get_reward({"name": "model", "path": str(folder), "label": 2}), ["x"], [{"prompt": "x"}])
    with pytest.raises(RewardError, match=r"have \d+ tokens for the reward model, which reads 4"):
        score(get_reward({"name": "model", "path": str(folder), "max_length": 4}), [" ".join(WORDS)], [{"prompt": "x"}])


def test_a_model_without_a_head_is_none(folder, tmp_path):
    """transformers would draw one at random."""
    from transformers import AutoConfig, LlamaForCausalLM

    write_tokenizer(tmp_path / "m", eos_token=EOS, chat_template=QWEN2)
    LlamaForCausalLM(AutoConfig.from_pretrained(folder)).save_pretrained(tmp_path / "m")
    with pytest.raises(
        RewardError, match="is no sequence classifier: it lacks score.weight, which would be drawn at random"
    ):
        score(get_reward({"name": "model", "path": str(tmp_path / "m")}), ["x"], [{"prompt": "x"}])
