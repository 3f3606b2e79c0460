"""A Hugging Face tokenizer's chat template: which one, what it reads, and what it makes of a conversation."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from recipes.data.errors import DataError

__all__ = ["ChatTemplate"]

Objects = Sequence[Mapping[str, Any]]


class ChatTemplate:
    """
    Args:
        tokenizer: transformers' own, whose template this is.
        path: where it was loaded from, for messages.
    """

    def __init__(self, tokenizer: Any, path: str):
        self._tokenizer, self.path = tokenizer, path

    def choose(self, choice: str | None) -> None:
        """Write conversations by another template: one of the tokenizer's own by its name, or that of a .jinja file. It is saved
        with the tokenizer.

        Raises:
            DataError: there is none of that name, and no such file.
        """
        if choice is None:
            return
        known = self._tokenizer.chat_template
        if isinstance(known, dict) and choice in known:
            self._tokenizer.chat_template = known[choice]
            return
        try:
            self._tokenizer.chat_template = Path(choice).expanduser().read_text(encoding="utf-8")
        except (OSError, RuntimeError, UnicodeDecodeError) as error:
            names = ", ".join(sorted(known)) if isinstance(known, dict) else "one without a name" if known else "none"
            raise DataError(
                f"data.chat_template={choice}: no file that can be read ({getattr(error, 'strerror', None) or error}), and the "
                f"templates of tokenizer {self.path} are: {names}"
            ) from error

    @property
    def asks_for_date(self) -> bool:
        """Whether it may write another text on another day."""
        return "strftime_now" in json.dumps(self._tokenizer.chat_template)

    def variables(self, tools: Objects | None) -> set[str]:
        """What it reads beside what it makes itself.

        Raises:
            DataError: there is none, or it is no template.
        """
        from jinja2 import Environment, TemplateError, ext, meta, nodes

        class Generation(ext.Extension):
            """transformers' block around what the assistant says."""

            tags = {"generation"}

            def parse(self, parser):
                line = next(parser.stream).lineno
                return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

        environment = Environment(extensions=[Generation, ext.loopcontrols])
        try:
            return meta.find_undeclared_variables(environment.parse(self._source(tools)))
        except TemplateError as error:
            raise DataError(f"the chat template of {self.path} is no template: {error}") from error

    @property
    def special_tokens(self) -> dict[str, str]:
        """Texts of the special tokens that it may write, by their names, such as bos_token."""
        return {name: str(token) for name, token in self._tokenizer.special_tokens_map.items()}

    @property
    def own_variables(self) -> set[str]:
        """What it is given whatever a row says."""
        arguments = inspect.signature(self._tokenizer.apply_chat_template).parameters
        given = {*arguments, *self._tokenizer.special_tokens_map, "messages", "raise_exception", "strftime_now"}
        return given - {"documents", "kwargs"}

    def render(
        self,
        messages: Objects,
        add_generation_prompt: bool,
        tools: Objects | None = None,
        variables: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """A conversation as the template writes it.

        Args:
            tools: as transformers has them; None: without.
            variables: more of what the template reads, such as enable_thinking.

        Raises:
            DataError: there is no template, or it or its renderer raises.
        """
        source = self._source(tools)
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(
                [*messages],
                tools=None if tools is None else [*tools],
                chat_template=source,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **variables,
            )
        except Exception as error:  # a template is somebody's program
            plain = isinstance(error, TemplateError)
            said = f"refuses messages: {error}" if plain else f"fails: {type(error).__name__}: {error}"
            raise DataError(f"the chat template of {self.path} {said}") from error

    def _source(self, tools: Objects | None) -> str:
        known = self._tokenizer.chat_template
        if not known:
            raise DataError(
                f"tokenizer {self.path} has no chat template: use rows with prompt (and response) instead of messages, "
                "name a .jinja file in data.chat_template, or add chat_template.jinja to its folder"
            )
        if isinstance(known, dict) and not {"default", "tool_use" if tools is not None else "default"} & set(known):
            raise DataError(
                f"tokenizer {self.path} has chat templates and none of them is the default: choose one by "
                f"data.chat_template={' or '.join(sorted(known))}"
            )
        return self._tokenizer.get_chat_template(tools=tools)
