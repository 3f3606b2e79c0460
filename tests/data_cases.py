"""Small tokenizers of the kinds that models have, chat templates that behave as those of models do, and files of rows.

The templates are written for these tests: each does in a few lines what some family's does in many.
"""

from __future__ import annotations

import json

import pytest

from recipes.data.errors import DataError
from recipes.data.rows import load_pairs

USER, ANSWER = {"role": "user", "content": "what is 1 + 2 ?"}, {"role": "assistant", "content": "it is 3"}
SYSTEM = {"role": "system", "content": "the quick"}
TOOL = {
    "type": "function",
    "function": {
        "name": "add", "description": "adds", "strict": None,
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}  # fmt: skip
CALL = {
    "role": "assistant", "content": None, "refusal": None,
    "tool_calls": [{"id": "abc123xyz", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": "x"}'}}],
}  # fmt: skip
RESULT = {"role": "tool", "tool_call_id": "abc123xyz", "content": "2"}
EOS, PAD, START = "<eos>", "<pad>", "<start>"
TEXTS = ["what is 1 + 2 ? it is 3", "the quick brown fox", "user assistant system"] * 3
# Writes whatever role it is given.
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no robots\nhere') }}{% endif %}"
    "<start>{{ m.role }}:{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}<start>assistant:{% endif %}"
)
# Qwen 2.5 and Qwen 3: tools before all, calls as JSON with arguments as an object, results as a user's; roles that it does not
# know are dropped. Qwen 3 writes what the assistant thought in the turns since the last question and drops it from earlier ones.
_QWEN = """
{%- macro thought(m) %}
    {%- if m.reasoning_content is string %}{{ m.reasoning_content }}
    {%- elif '</think>' in (m.content or '') %}{{ m.content.split('</think>')[0].split('<think>')[-1] }}{% endif %}
{%- endmacro %}
{%- if tools %}<start>system:{% for tool in tools %}{{ tool | tojson }}{% endfor %}<eos>{% endif %}
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- if m.role == 'system' or m.role == 'user' %}<start>{{ m.role }}:{{ m.content }}<eos>
    {%- elif m.role == 'assistant' %}<start>assistant:
        {%- if THINKS and loop.index0 > ns.last %}<think>{{ thought(m) | trim }}</think>{% endif %}
        {%- if THINKS %}{{ (m.content or '').split('</think>')[-1] }}{% else %}{{ m.content or '' }}{% endif %}
        {%- for call in m.tool_calls or [] %}{% set call = call.function or call -%}
            <call>{"name": "{{ call.name }}", "arguments": {{ call.arguments | tojson }}}</call>
        {%- endfor %}<eos>
    {%- elif m.role == 'tool' %}<start>user:<result>{{ m.content }}</result><eos>{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<start>assistant:
    {%- if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}
{%- endif %}"""
QWEN2, QWEN3 = _QWEN.replace("THINKS", "false"), _QWEN.replace("THINKS", "true")
# Llama 3: a date, trimmed contents, one call at a time instead of content, a role of its own for results.
LLAMA = """
{%- if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif -%}
<start>system:Today {{ date_string }}
{%- if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% set messages = messages[1:] %}{% endif %}
{%- for tool in tools or [] %}{{ tool | tojson }}{% endfor %}<eos>
{%- for m in messages %}
    {%- if 'tool_calls' in m %}
        {%- if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
        {%- set call = m.tool_calls[0].function -%}
        <start>assistant:{{ call.name }}({% for k, v in call.arguments | items %}{{ k }}={{ v | tojson }}{% endfor %})<eos>
    {%- elif m.role == 'tool' %}<start>ipython:{{ m.content }}<eos>
    {%- else %}<start>{{ m.role }}:{{ m.content | trim }}<eos>{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<start>assistant:{% endif %}"""
# Mistral: roles take turns, the system message goes into the last question, calls have ids of nine letters.
MISTRAL = """
{%- if messages[0].role == 'system' %}{% set first = messages[0].content %}{% set messages = messages[1:] %}{% endif %}
{%- set questions = messages | selectattr('role', 'equalto', 'user') | list -%}
<start>
{%- for m in messages %}
    {%- if m.role == 'user' and loop.index0 % 2 == 0 -%}
        [INST]{% if first is defined and m == questions[-1] %}{{ first }} {% endif %}{{ m.content }}[/INST]
    {%- elif m.role == 'assistant' and loop.index0 % 2 == 1 %} {{ m.content }}<eos>
    {%- else %}{{ raise_exception('roles must take turns') }}{% endif %}
{%- endfor %}"""
FAMILIES = {"qwen2": QWEN2, "qwen3": QWEN3, "llama": LLAMA, "mistral": MISTRAL}


def write_tokenizer(folder, around="", **config):
    """A byte-level BPE tokenizer with a folder's files, and a truncation that must not apply.

    Args:
        around: what it puts around a text of its own, such as "<start> $A".
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=[EOS, PAD, START], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.enable_truncation(4)
    if around:
        special = [(token, tokenizer.token_to_id(token)) for token in (EOS, START)]
        tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=special)
    return _save(tokenizer, folder, config)


def write_sentencepiece(folder, texts=(), **config):
    """A tokenizer like that of Llama 2: spaces are part of words, one is put before every text, bytes for what is unknown."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers

    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[EOS, PAD, START, *byte_tokens], show_progress=False)
    trained.train_from_iterator([f" {word}" for text in (*TEXTS, *texts) for word in text.split()], trainer)
    state = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in state["merges"]]
    tokenizer = Tokenizer(models.BPE(state["vocab"], merges, byte_fallback=True, fuse_unk=True))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (EOS, PAD, START)])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [(START, tokenizer.token_to_id(START))]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{START} $A", special_tokens=special)
    return _save(tokenizer, folder, {"eos_token": EOS, "bos_token": START} | config)


def write_unigram(folder, texts):
    """A tokenizer like that of Mistral's and T5's newer files: the likeliest pieces of a text, a space before its first word.

    Args:
        texts: whose characters it knows.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    alphabet = sorted({character for text in texts for character in text} - {" "})
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=[EOS, "<unk>"], unk_token="<unk>", initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*TEXTS * 5, *texts], trainer)
    return _save(tokenizer, folder, {"eos_token": EOS})


def write_words(folder, vocabulary, *added):
    """A tokenizer of whole words, with "?" for unknown ones."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(EOS, special=True), *(AddedToken(a, special=True) for a in added)])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS}))
    return folder


def _save(tokenizer, folder, config):
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config})
        )
    return folder


def write_rows(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def write_table(path, rows, **options):
    """Rows as a table of the kind that the file's name says; `.stream.arrow` as `datasets` writes it."""
    import pyarrow as pa
    from pyarrow import ipc, parquet

    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        parquet.write_table(table, path, **options)
    else:
        new = ipc.new_stream if ".stream" in path.name else ipc.new_file
        with new(str(path), table.schema) as writer:
            writer.write_table(table, **options)
    return path


def encode_chat(tokenizer, messages, generate, tools=None, **variables):
    """A conversation in tokens."""
    return tokenizer.encode(tokenizer.template.render(messages, generate, tools, variables))


def names_in(folder) -> set[str]:
    """Of files and folders."""
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def refused(function, *arguments, **options) -> str:
    """The one line that is said of bad data."""
    with pytest.raises(DataError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def text_of(tokenizer, tokens) -> str:
    """With special tokens."""
    return tokenizer._tokenizer.decode(list(tokens))


def one_pair(tmp_path, tokenizer, row, **options):
    (pair,) = load_pairs(write_rows(tmp_path / "one.jsonl", row), tokenizer, 10_000, **options)
    return pair


def one_refusal(tmp_path, load, tokenizer, row, **options) -> str:
    path = write_rows(tmp_path / "one.jsonl", row)
    message = refused(load, path, tokenizer, 10_000, **options)
    assert message.startswith(f"{path}:1: ")
    return message.removeprefix(f"{path}:1: ")
