"""A GGUF file of SmolLM2 as a Hugging Face folder: what tools/fetch_model.py needs of the format, and no more.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A file is a header, metadata by key, a list of tensors
with their places, and their bytes; a quantised tensor is blocks of 32 numbers with a scale, and perhaps an offset, each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from megatron_ext.errors import UserError

__all__ = ["GGUF", "write_hf_folder"]

BLOCK = 32  # numbers of a quantised block
ALIGNMENT = 32  # of the tensors' bytes, unless the file says otherwise
STRING, ARRAY = 8, 9
SCALARS = {
    0: np.uint8, 1: np.int8, 2: np.uint16, 3: np.int16, 4: np.uint32, 5: np.int32, 6: np.float32, 7: np.bool_,
    10: np.uint64, 11: np.int64, 12: np.float64,
}  # fmt: skip
CONTROL = 3  # type of a token that no text becomes


def _with_offset(blocks: np.ndarray) -> np.ndarray:
    """Q4_1, uint8 [n, 20] -> fp32 [n, 32]: scale, offset, then the low halves of 16 bytes and their high halves."""
    scale, offset = (blocks[:, i : i + 2].copy().view(np.float16).astype(np.float32) for i in (0, 2))
    return np.concatenate((blocks[:, 4:] & 15, blocks[:, 4:] >> 4), 1) * scale + offset


def _bytes(blocks: np.ndarray) -> np.ndarray:
    """Q8_0, uint8 [n, 34] -> fp32 [n, 32]: scale, then signed bytes."""
    return blocks[:, 2:].view(np.int8) * blocks[:, :2].copy().view(np.float16).astype(np.float32)


def _plain(blocks: np.ndarray) -> np.ndarray:
    return blocks.copy().view(np.float32)  # of its own, not the file's


# Of each type that is read: its bytes per block, its numbers per block, and what they mean.
TYPES: dict[int, tuple[int, int, Callable[[np.ndarray], np.ndarray]]] = {
    0: (4, 1, _plain), 3: (20, BLOCK, _with_offset), 8: (34, BLOCK, _bytes),
}  # fmt: skip


class GGUF:
    """
    Attributes:
        metadata: by key, arrays as lists.

    Raises:
        UserError: no GGUF, one of another version, or damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        self._data, self._place = memoryview(np.memmap(path, np.uint8, "r")), 4
        if self._data[:4] != b"GGUF":
            raise UserError(f"{path} is no GGUF file")
        if (version := self._number(4)) not in (2, 3):
            raise UserError(f"{path} is of GGUF version {version}; 2 and 3 are read")
        tensors, keys = self._number(10), self._number(10)
        self.metadata: dict[str, Any] = {self._string(): self._value(self._number(4)) for _ in range(keys)}
        self._tensors = {}
        for _ in range(tensors):
            name, dimensions = self._string(), self._number(4)
            shape = tuple(reversed(self._array(np.uint64, dimensions).tolist()))  # the fastest comes first
            self._tensors[name] = (shape, self._number(4), self._number(10))
        alignment = self.metadata.get("general.alignment", ALIGNMENT)
        self._begin = -(-self._place // alignment) * alignment

    def __iter__(self):
        """Names of tensors."""
        return iter(self._tensors)

    def __getitem__(self, key: str) -> Any:
        """A metadata value that must be there."""
        if key not in self.metadata:
            raise UserError(f"{self.path} has no {key}")
        return self.metadata[key]

    def tensor(self, name: str) -> np.ndarray:
        """fp32, of the shape that a Hugging Face tensor has."""
        shape, kind, offset = self._tensors[name]
        if kind not in TYPES:
            raise UserError(f"{self.path}: {name} is of type {kind}; {', '.join(map(str, TYPES))} are read")
        size, numbers, decode = TYPES[kind]
        self._place = self._begin + offset
        blocks = self._array(np.uint8, int(np.prod(shape)) // numbers * size).reshape(-1, size)
        return decode(blocks).reshape(shape)

    def _take(self, size: int) -> memoryview:
        start, self._place = self._place, self._place + size
        if self._place > len(self._data):
            raise UserError(f"{self.path} is damaged: it ends too early; fetch it again")
        return self._data[start : self._place]

    def _array(self, dtype: type, count: int) -> np.ndarray:
        return np.frombuffer(self._take(np.dtype(dtype).itemsize * count), dtype)

    def _number(self, kind: int) -> Any:
        return self._array(SCALARS[kind], 1)[0].item()

    def _string(self) -> str:
        return bytes(self._take(int.from_bytes(self._take(8), "little"))).decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            inner, count = self._number(4), self._number(10)
            if inner in SCALARS:
                return self._array(SCALARS[inner], count).tolist()
            return [self._value(inner) for _ in range(count)]
        if kind not in SCALARS:
            raise UserError(f"{self.path} is damaged: there is no type {kind} of values; fetch it again")
        return self._number(kind)


TENSORS = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
NUMBERS = {
    "num_hidden_layers": "block_count", "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length", "vocab_size": "vocab_size", "rope_theta": "rope.freq_base",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}  # fmt: skip
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def write_hf_folder(source: Path, folder: Path) -> None:
    """Write config.json, weights in fp32 and tokenizer of a GGUF file of SmolLM2 into a folder that is there.

    Raises:
        UserError: another model's, or a damaged file.
    """
    file = GGUF(source)
    kind = file["general.architecture"], file["tokenizer.ggml.model"], file["tokenizer.ggml.pre"]
    if kind != ("llama", "gpt2", "smollm"):
        raise UserError(f"{source} is of {' '.join(kind)}; only SmolLM2's (llama gpt2 smollm) is read")
    config = _config(file)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    save_file(
        {_their_name(file, name): torch.from_numpy(_tensor(file, name, heads)) for name in file},
        str(folder / "model.safetensors"),
        metadata={"format": "pt"},
    )
    (folder / "model.safetensors").chmod(0o644)  # safetensors leaves it to its owner alone
    special = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, content in (("config.json", config), ("generation_config.json", special)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _tokenizer(file).save_pretrained(str(folder))


def _config(file: GGUF) -> dict[str, Any]:
    numbers = {name: file[f"llama.{theirs}"] for name, theirs in NUMBERS.items()}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **numbers,
        "rms_norm_eps": float(f"{numbers['rms_norm_eps']:.6g}"),  # it stands there in fp32
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in set(file),
        "dtype": "float32",
        **{f"{name}_id": file[f"tokenizer.ggml.{theirs}_token_id"] for name, theirs in SPECIAL.items()},
    }


def _their_name(file: GGUF, name: str) -> str:
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name)
    if found is None or found[2] not in TENSORS:
        raise UserError(f"{file.path}: {name} is no tensor of SmolLM2")
    return f"{'' if found[1] is None else f'model.layers.{found[1]}.'}{TENSORS[found[2]]}.weight"


def _tensor(file: GGUF, name: str, heads: dict[str, int]) -> np.ndarray:
    """Queries and keys stand in GGUF with their pairs of channels side by side, in transformers half a head apart."""
    tensor, count = file.tensor(name), heads.get(name.split(".")[-2])
    if count is not None:
        pairs = tensor.reshape(count, -1, 2, tensor.shape[1])
        tensor = pairs.swapaxes(1, 2).reshape(tensor.shape)
    return np.ascontiguousarray(tensor)


def _tokenizer(file: GGUF):
    """SmolLM's: digits one by one, then GPT-2's byte-level pairs."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = file["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in file["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges))
    byte_level = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(**byte_level)]
    )
    tokenizer.decoder = decoders.ByteLevel(**byte_level)
    kinds = zip(words, file["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word, kind in kinds if kind == CONTROL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=file["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False,
        model_max_length=file["llama.context_length"],
        **{name: words[file[f"tokenizer.ggml.{theirs}_token_id"]] for name, theirs in SPECIAL.items()},
    )
