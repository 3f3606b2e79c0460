"""Tokenizers with the chat templates of families, and calls as these write them."""

from __future__ import annotations

import pytest

from recipes.data.tokenizer import load_tokenizer
from tests.data_cases import EOS, FAMILIES, START, TEMPLATE, write_tokenizer

# Llama 3.1: a call is all that a turn is, its arguments are called parameters, and results are written as JSON.
LLAMA31 = """
{%- for tool in tools or [] %}{{ tool | tojson }}{% endfor %}
{%- for m in messages %}<start>{{ 'ipython' if m.role == 'tool' else m.role }}:
    {%- if m.tool_calls %}{% set call = m.tool_calls[0].function -%}
        {"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}
    {%- elif m.role == 'tool' %}{{ m.content | tojson }}
    {%- else %}{{ m.content | trim }}{% endif %}<eos>
{%- endfor %}{% if add_generation_prompt %}<start>assistant:{% endif %}"""
# Mistral's newer ones: calls in a list behind a word, each with an id.
MISTRAL3 = """
{%- for tool in tools or [] %}[AVAILABLE_TOOLS]{{ tool | tojson }}{% endfor %}
{%- for m in messages %}
    {%- if m.role == 'user' %}[INST]{{ m.content }}[/INST]
    {%- elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]
    {%- elif m.tool_calls %}[TOOL_CALLS] [
        {%- for c in m.tool_calls %}{{ dict(c.function, id=c.id) | tojson }}{{ ', ' if not loop.last }}{% endfor %}]<eos>
    {%- else %} {{ m.content }}<eos>{% endif %}
{%- endfor %}"""


@pytest.fixture(scope="session")
def families(tmp_path_factory):
    """By name."""
    special = {"eos_token": EOS, "bos_token": START}
    folder = tmp_path_factory.mktemp("tokenizers")
    templates = FAMILIES | {"llama31": LLAMA31, "mistral3": MISTRAL3, "any role": TEMPLATE}
    return {
        name: load_tokenizer(write_tokenizer(folder / name, chat_template=template, **special))
        for name, template in templates.items()
    }
