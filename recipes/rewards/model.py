"""The reward model: a Hugging Face sequence classifier. Serve it (launch/serve_reward.py), or let each data-parallel rank keep
its own."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from megatron_ext.errors import UserError
from recipes.cli.config import ConfigError
from recipes.rewards.asking import asker
from recipes.rewards.registry import KEY, register_reward

__all__ = ["RewardModel"]

DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class _Loaded:
    tokenizer: Any = None
    model: Any = None


@register_reward("model")
@dataclass(frozen=True)
class RewardModel:
    """A logit of a sequence classifier, for the prompt and the response behind it: through the chat template where the row has
    messages, else one text behind the other."""

    row_keys: ClassVar = ()

    # Folder with the classifier and its tokenizer.
    path: str
    # Which of its logits.
    label: int = 0
    # Texts of a forward pass.
    batch_size: int = 8
    # Longest text in tokens; null: what the tokenizer says. A longer one is refused, as what was cut off would not be scored.
    max_length: int | None = None
    # Device and dtype; null: this rank's GPU if there is one.
    device: str | None = None
    dtype: str = "float32"
    _loaded: _Loaded = field(default_factory=_Loaded, init=False, repr=False, compare=False)

    def __post_init__(self):
        if not Path(self.path, "config.json").is_file():
            raise ConfigError(f"{KEY}.path={self.path} is no folder of a Hugging Face model: it has no config.json")
        if self.dtype not in DTYPES:
            raise ConfigError(f"{KEY}.dtype={self.dtype} must be one of {', '.join(DTYPES)}")
        if self.batch_size < 1 or self.label < 0:
            raise ConfigError(f"{KEY}: batch_size={self.batch_size} must be at least 1, label={self.label} at least 0")

    def prepare(self) -> None:
        """Load it: what asks does so before the time of a call begins.

        Raises:
            UserError: it is no classifier with that label.
        """
        if self._loaded.model is not None:
            return
        os.environ["HF_HUB_OFFLINE"] = "1"  # a folder is all that is read
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from megatron_ext.runtime.distributed import local_device

        device = self.device or local_device()  # a process of its own has no current one
        model, said = AutoModelForSequenceClassification.from_pretrained(
            self.path, dtype=getattr(torch, self.dtype), local_files_only=True, output_loading_info=True
        )
        if missing := sorted(said["missing_keys"]):
            raise UserError(
                f"{self.path} is no sequence classifier: it lacks {missing[0]}, which would be drawn at random"
            )
        if self.label >= model.config.num_labels:
            raise UserError(
                f"{KEY}.label={self.label}, and {self.path} has {model.config.num_labels} labels, counted from 0"
            )
        tokenizer = AutoTokenizer.from_pretrained(self.path, local_files_only=True)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if model.config.pad_token_id is None:  # by which decoders find a text's last token
            model.config.pad_token_id = tokenizer.pad_token_id
        tokenizer.padding_side = "right"
        self._loaded.tokenizer, self._loaded.model = tokenizer, model.to(device).eval()

    def __call__(self, responses: Sequence[str], rows: Sequence[dict]) -> list[float]:
        self.prepare()
        texts = [self._tokens(response, row) for response, row in zip(responses, rows, strict=True)]
        # Texts of one length together: padding is computed, too.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        values = dict(zip(order, self._values([texts[i] for i in order]), strict=True))
        return [values[i] for i in range(len(texts))]

    def _values(self, texts: list[list[int]]) -> Iterator[float]:
        import torch

        model, tokenizer = self._loaded.model, self._loaded.tokenizer
        for first in range(0, len(texts), self.batch_size):
            asker().check()
            part = {"input_ids": texts[first : first + self.batch_size]}
            batch = tokenizer.pad(part, return_tensors="pt").to(model.device)  # [texts, longest]
            with torch.inference_mode():
                logits = model(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
                ).logits  # [texts, labels]
            yield from logits[:, self.label].double().tolist()

    def _tokens(self, response: str, row: Mapping[str, Any]) -> list[int]:
        tokenizer = self._loaded.tokenizer
        if row.get("messages") is not None:
            messages = [*row["messages"], {"role": "assistant", "content": response}]
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = tokenizer(row["prompt"] + response)["input_ids"]
        limit = self.max_length or tokenizer.model_max_length
        if len(ids) > limit:
            raise UserError(
                f"prompt and response have {len(ids)} tokens for the reward model, which reads {limit}: shorten responses, or "
                f"set {KEY}.max_length if it reads more"
            )
        return ids
