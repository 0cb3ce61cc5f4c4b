"""Chat messages to token ids, by the model's own tokenizer and chat template."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from megatron_lopd.errors import ConfigError, DataError
from megatron_lopd.prompts.prompt import Message

Tokens = NDArray[np.int32]

# What a template that asks for today's date is told, so that a prompt is the same whenever it is rendered: in
# the shards before and after midnight, in training and in evaluation. It is the date that Llama 3.2's own
# template falls back on, the best known of those that ask.
TODAY = datetime.datetime(2024, 7, 26)


def end_tokens(model_dir: str, tokenizer: Any) -> frozenset[int]:
    """Ids that end a response: `eos_token_id` of generation_config.json, and the tokenizer's end token.

    Raises ConfigError when neither names one: sampling would never stop.
    """
    found = {tokenizer.eos_token_id}
    path = Path(model_dir, "generation_config.json")
    if path.is_file():
        try:
            named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (json.JSONDecodeError, AttributeError) as error:
            raise ConfigError(f"{path}: not a JSON object: {error}") from None
        ids = named if isinstance(named, list) else [named]
        for token in ids:
            if token is not None and not (isinstance(token, int) and 0 <= token < len(tokenizer)):
                raise ConfigError(
                    f"{path}: eos_token_id {token!r} is no token id: give one below {len(tokenizer)}"
                )
        found.update(ids)
    found.discard(None)
    if not found:
        raise ConfigError(
            f"{model_dir}: no end token: set eos_token in tokenizer_config.json or eos_token_id in "
            "generation_config.json"
        )
    return frozenset(found)


def without_clock(template: str) -> str:
    """A chat template whose `strftime_now`, which transformers lets read the clock, is of TODAY.

    One that does not ask is left as it is. No function can be handed to a template, so this is a macro before
    it; the template's first line is its first line still, for Jinja2 to trim.
    """
    if "strftime_now" not in template:
        return template
    known = [f"%{pad}{letter}" for pad in ("", "-") for letter in "aAbBcdeDFHIjmMpSTuUwWxXyYZ"]
    filters = "".join(f"|replace('{each}', '{TODAY.strftime(each)}')" for each in [*known, "%%"])
    return f"{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}\n{template}"


class Chat:
    """A Hugging Face directory's tokenizer with a chat template and end tokens, all three required.

    `end_tokens`: ids that end a response. Raises ConfigError when the directory has no usable tokenizer,
    chat template or end token.
    """

    def __init__(self, model_dir: str, trust_remote_code: bool = False) -> None:
        if not Path(model_dir).is_dir():
            raise ConfigError(f"{model_dir}: no such model directory")
        from transformers import AutoTokenizer  # takes seconds, and training's ranks make no Chat

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(
                model_dir, trust_remote_code=trust_remote_code, local_files_only=True
            )
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise ConfigError(f"{model_dir}: its tokenizer does not load: {_first_line(error)}") from error
        if not self.tokenizer.chat_template:
            raise ConfigError(
                f"{model_dir}: the tokenizer has no chat template: add chat_template.jinja to the directory"
            )
        self._template = without_clock(self.tokenizer.get_chat_template())
        self.end_tokens = end_tokens(model_dir, self.tokenizer)

    def prompt(self, messages: Sequence[Message], name: str, max_tokens: int) -> Tokens:
        """Ids of `messages` and the opening of the assistant's turn: int32 [P], 1 <= P <= max_tokens.

        `name` is the sample's, for messages. Raises DataError when the template refuses the messages or the
        prompt is longer than `max_tokens`.
        """
        return self._prompt(self._render(messages, name, open_turn=True), name, max_tokens)

    def conversation(
        self, messages: Sequence[Message], name: str, max_tokens: int, limit: str = "the limit"
    ) -> tuple[Tokens, Tokens]:
        """(prompt, response) ids of a conversation that ends with the assistant's message, to train on.

        int32 [P] and [T], P + T <= max_tokens. The prompt is just what `prompt` gives for the messages
        before, and the response what a sampler would have to produce after it, up to and including the end
        token: they are tokenized apart. What the template puts after it (a line break, say) is dropped.

        Raises DataError when the rendered prompt is not the beginning of the rendered conversation, when the
        answer has no end token or text after it, or when there are more than `max_tokens`, which is `limit`.
        """
        opening = self._render(messages[:-1], name, open_turn=True)
        whole = self._render(messages, name, open_turn=False)
        if not whole.startswith(opening):
            raise DataError(
                f"{name}: the chat template renders the prompt otherwise once it is answered, so the answer "
                "cannot be told from it: use a template whose generation prompt begins the assistant's turn"
            )
        prompt = self._prompt(opening, name, max_tokens)
        response = self._encode(whole[len(opening) :])
        ends = np.flatnonzero(np.isin(response, list(self.end_tokens)))
        if not len(ends):
            names = ", ".join(self.tokenizer.convert_ids_to_tokens(sorted(self.end_tokens)))
            raise DataError(
                f"{name}: the chat template puts no end token ({names}) after the answer: "
                "training on it would teach the model never to stop"
            )
        response, after = response[: ends[0] + 1], response[ends[0] + 1 :]
        if left := self.decode(after).strip():
            raise DataError(f"{name}: the answer goes on after its end token: {left!r}")
        if len(prompt) + len(response) > max_tokens:
            raise DataError(
                f"{name}: prompt and answer have {len(prompt) + len(response)} tokens, above {limit} of "
                f"{max_tokens}: shorten or drop the sample, or raise that"
            )
        return prompt, response

    def decode(self, tokens: Tokens) -> str:
        """The text of a response, without its end token or any other special token."""
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _prompt(self, rendered: str, name: str, max_tokens: int) -> Tokens:
        tokens = self._encode(rendered)
        if not len(tokens):
            raise DataError(f"{name}: the chat template renders an empty prompt")
        if len(tokens) > max_tokens:
            raise DataError(
                f"{name}: the prompt has {len(tokens)} tokens, above the limit of {max_tokens}: "
                "raise the limit or drop the prompt"
            )
        return tokens

    def _render(self, messages: Sequence[Message], name: str, open_turn: bool) -> str:
        try:
            rendered: str = self.tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=open_turn,
                chat_template=self._template,
            )
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise DataError(f"{name}: the chat template refuses it: {_first_line(error)}") from error
        return rendered

    def _encode(self, text: str) -> Tokens:
        # The template has put in every special token there is to be.
        return np.array(self.tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
