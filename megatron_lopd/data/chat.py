"""Chat messages to token ids, by the model's own tokenizer and chat template.

What a message says must be printed, and printed as text: a template that leaves a part of it out is refused
(`printed`), and a control token spelled out by whoever wrote a question stays the letters that it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_lopd.data.end_tokens import end_tokens
from megatron_lopd.data.printed import first_unprinted, leaves, marked, reaches, shape
from megatron_lopd.data.vocabulary import load_tokenizer
from megatron_lopd.errors import ConfigError, DataError, reason_of
from megatron_lopd.prompts.clock import without_clock
from megatron_lopd.prompts.prompt import Message
from megatron_lopd.runtime.bounded import Failed, bounded

Tokens = NDArray[np.int32]
# A sample's name, for messages, and what it says.
Named = tuple[str, Sequence[Message]]

# Tokens that an answer may well spell out: they are part of what is said, not of who says it.
CONTENT_MARKS = frozenset(
    {"<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"}
)
# Of the processor, that a rendering may take: it takes a tenth of a millisecond.
TEMPLATE_SECONDS = 10.0
# Characters that one may have: more than any model reads.
LONGEST_TEXT = 1 << 24
# Which Jinja can write, as JSON can, and no tokenizer takes.
_HALF = re.compile("[\ud800-\udfff]")
# What a template would have another text from each time.
_CHANCE = re.compile(r"\|\s*random\b|\blipsum\b")
# One that is not in the text splits a control token that is spelled out: no half of it is one.
_SPLITS = tuple(map(chr, range(0xE000, 0xE010)))


class Chat:
    """A Hugging Face directory's tokenizer with a chat template and end tokens, all three required.

    `end_tokens`: ids that end a response. `spelled`: how many of the prompts so far spell out a control
    token. `unwritten`: the names of those with text that the tokenizer has no token for. Raises ConfigError
    when the directory has no usable tokenizer, chat template or end token.
    """

    def __init__(self, model_dir: str, trust_remote_code: bool = False) -> None:
        self._model_dir = model_dir
        self.tokenizer = load_tokenizer(model_dir, trust_remote_code)
        if not self.tokenizer.chat_template:
            raise ConfigError(
                f"{model_dir}: the tokenizer has no chat template: add chat_template.jinja to the directory"
            )
        try:
            template = self.tokenizer.get_chat_template()
        except Exception as error:  # noqa: BLE001 - of several templates none is the default one, say
            raise ConfigError(f"{model_dir}: no chat template to use: {reason_of(error)}") from None
        if not isinstance(template, str):  # it is given back as tokenizer_config.json has it
            raise ConfigError(f"{model_dir}: the chat template is no text, but {type(template).__name__}")
        if _CHANCE.search(template):
            raise ConfigError(
                f"{model_dir}: the chat template draws at random, and a prompt must be the same each time it "
                "is rendered: take that out of it"
            )
        self._template = without_clock(template)
        self._shapes: set[tuple[str, bool]] = set()
        self.spelled = 0
        self.unwritten: list[str] = []
        self._has_token: dict[str, bool] = {}
        self.end_tokens = end_tokens(model_dir, self.tokenizer)

    def prompt(self, messages: Sequence[Message], name: str, max_tokens: int) -> Tokens:
        """`prompts` of one."""
        return self.prompts([(name, messages)], max_tokens)[0]

    def prompts(self, asked: Sequence[Named], max_tokens: int) -> list[Tokens]:
        """Ids of each one's messages and the opening of the assistant's turn: int32 [P], P in 1..max_tokens.

        Raises DataError naming the sample when the template refuses the messages, does not print all that
        they say, or takes too long; and when the prompt is longer than `max_tokens`.
        """
        self._require_printed(asked, is_answered=False)
        split = [self._with_split_tokens(name, messages) for name, messages in asked]
        tokens = []
        requests = [(messages, True) for messages, _ in split]
        for (name, messages), (_, mark), rendered in zip(
            asked, split, self._rendered(asked, requests), strict=True
        ):
            self._require(name, messages, first_unprinted(messages, rendered.replace(mark, "")))
            tokens.append(self._prompt(rendered, mark, name, max_tokens))
            self._require_written(name, messages, rendered, mark, tokens[-1])
        return tokens

    def conversation(
        self, messages: Sequence[Message], name: str, max_tokens: int, limit: str = "the limit"
    ) -> tuple[Tokens, Tokens]:
        """`conversations` of one."""
        (found,) = self.conversations([(name, messages)], max_tokens, limit)
        return found

    def conversations(
        self, asked: Sequence[Named], max_tokens: int, limit: str = "the limit"
    ) -> Iterator[tuple[Tokens, Tokens]]:
        """(prompt, response) ids of conversations that end with the assistant's message, to train on.

        int32 [P] and [T], P + T <= max_tokens. The prompt is just what `prompt` gives for the messages
        before, and the response what a sampler would have to produce after it, up to and including the end
        token: they are tokenized apart. What the template puts after it (a line break, say) is dropped.

        Raises DataError as `prompts` does, and when the rendered prompt is not the beginning of the rendered
        conversation, when the answer is not printed whole, has no end token or text after it, or when there
        are more than `max_tokens`, which is `limit`.
        """
        self._require_printed(asked, is_answered=True)
        split = [self._with_split_tokens(name, messages) for name, messages in asked]
        requests = [
            request for messages, _ in split for request in ((messages[:-1], True), (messages, False))
        ]
        twice = [each for each in asked for _ in range(2)]
        rendered = self._rendered(twice, requests)
        for (name, messages), (_, mark) in zip(asked, split, strict=True):
            opening, whole = next(rendered), next(rendered)
            yield self._answered(name, messages, opening, whole, mark, max_tokens, limit)

    def _answered(
        self,
        name: str,
        messages: Sequence[Message],
        opening: str,
        whole: str,
        mark: str,
        max_tokens: int,
        limit: str,
    ) -> tuple[Tokens, Tokens]:
        if not whole.startswith(opening):
            raise self._error(
                name,
                "the chat template renders the prompt otherwise once it is answered, so the answer "
                "cannot be told from it: use a template whose generation prompt begins the assistant's turn",
            )
        bare = whole.replace(mark, "")
        self._require_short(name, bare, max_tokens)
        self._require(name, messages, first_unprinted(messages, bare))
        for key, text in leaves(messages[-1]):
            if not reaches(text, opening.replace(mark, ""), bare):
                self._require(name, messages, (len(messages) - 1, key))
        prompt = self._prompt(opening, mark, name, max_tokens)
        response = self._encode(whole[len(opening) :])
        self._require_written(name, messages, whole, mark, np.concatenate([prompt, response]))
        ends = np.flatnonzero(np.isin(response, list(self.end_tokens)))
        if not len(ends):
            names = ", ".join(self.tokenizer.convert_ids_to_tokens(sorted(self.end_tokens)))
            raise self._error(
                name,
                f"the chat template puts no end token ({names}) after the answer: "
                "training on it would teach the model never to stop",
            )
        response, after = response[: ends[0] + 1], response[ends[0] + 1 :]
        if left := self.decode(after).strip():
            raise self._error(name, f"the answer goes on after its end token: {left!r}")
        if len(prompt) + len(response) > max_tokens:
            raise self._error(
                name,
                f"prompt and answer have {len(prompt) + len(response)} tokens, above {limit} of "
                f"{max_tokens}: shorten or drop the sample, or raise that",
            )
        return prompt, response

    def decode(self, tokens: Tokens) -> str:
        """The text of a response, without its end token or any other special token."""
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _require_printed(self, asked: Sequence[Named], is_answered: bool) -> None:
        """Raise DataError for a message of a role or a key that the template does not print.

        Asked once of messages of the same roles and keys, with words that are found nowhere else: what is
        said can be so short that it is in the rendering by chance.
        """
        new: dict[tuple[str, bool], Named] = {}
        for name, messages in asked:
            if (kind := (shape(messages), is_answered)) not in self._shapes:
                new.setdefault(kind, (name, messages))
        probes = [marked(messages) for _, messages in new.values()]

        def render(messages: Sequence[Message]) -> str | None:
            try:
                return self._render(messages, open_turn=not is_answered)
            except Exception:  # noqa: BLE001 - the template refuses such words; what is really said comes next
                return None

        for (name, messages), probe, rendered in zip(
            new.values(), probes, bounded(render, probes, TEMPLATE_SECONDS), strict=False
        ):
            if isinstance(rendered, Failed):
                raise self._refused(name, rendered)
            if rendered is not None:
                self._require(name, messages, first_unprinted(probe, rendered))
        self._shapes.update(new)

    def _require(self, name: str, messages: Sequence[Message], unprinted: tuple[int, str] | None) -> None:
        """Raise DataError where something is `unprinted`: (number of the message, key)."""
        if unprinted is None:
            return
        number, key = unprinted
        raise self._error(
            name,
            f"the chat template does not print messages[{number}].{key}, of role "
            f"{messages[number]['role']!r}, or not all of it: the model would never see it: take it out of "
            "the data, rename what the template knows by another name, or use a template that prints it",
        )

    def _with_split_tokens(self, name: str, messages: Sequence[Message]) -> tuple[Sequence[Message], str]:
        """`messages` with a mark after the first letter of each control token spelled out in them; the mark,
        which is empty where there is none.

        Raises DataError where the assistant's own words spell one out: there it would be trained on.
        """
        texts = [(message, key, text) for message in messages for key, text in leaves(message)]
        found = [(message, key, text) for message, key, text in texts if self._control(message).search(text)]
        if not found:
            return messages, ""
        for message, key, text in found:
            if message["role"] == "assistant":
                token = self._control(message).findall(text)[0]
                raise self._error(
                    name,
                    f"the assistant's {key} spells out the control token {token}: take it out: "
                    "the chat template puts in those that there are to be",
                )
        self.spelled += 1
        everything = "".join(text for _, _, text in texts)
        mark = next((each for each in _SPLITS if each not in everything), None)
        if mark is None:
            raise self._error(name, "it has every character that could tell text from control tokens")

        def split(value: Any, pattern: re.Pattern[str]) -> Any:
            if isinstance(value, str):
                return pattern.sub(lambda token: f"{token[0][0]}{mark}{token[0][1:]}", value)
            if isinstance(value, Mapping):
                return {key: split(each, pattern) for key, each in value.items()}
            return [split(each, pattern) for each in value] if isinstance(value, list) else value

        return [split(message, self._control(message)) for message in messages], mark

    def _control(self, message: Message) -> re.Pattern[str]:
        """What the words of a message may not turn into: an assistant may think, and call tools."""
        return self._control_tokens[message["role"] == "assistant"]

    @cached_property
    def _control_tokens(self) -> tuple[re.Pattern[str], re.Pattern[str]]:
        """Of whoever asks, and of the assistant: the added tokens that are special, or in the template.

        White space, which some tokenizers add tokens for, is text.
        """
        added = self.tokenizer.added_tokens_decoder.values()
        control = {
            each.content: each.special
            for each in added
            if len(each.content) > 1 and not each.content.isspace()
            if each.special or (each.content in self._template and each.content not in CONTENT_MARKS)
        }
        return _any_of(control.keys()), _any_of(control.keys() - CONTENT_MARKS)

    def _require_written(
        self, name: str, messages: Sequence[Message], rendered: str, mark: str, tokens: Tokens
    ) -> None:
        """Note where `tokens` lose text: for some the tokenizer has the unknown token alone, or none at all.

        Raises DataError where that is all there is of what is said last: the question, or the answer.
        """
        unknown: int | None = self.tokenizer.unk_token_id
        # The template may print the unknown token; one that a question spells out has a mark in it.
        is_whole = unknown is None or np.count_nonzero(tokens == unknown) <= rendered.count(
            self.tokenizer.unk_token
        )
        if is_whole and all(map(self._writes, set(self._added.sub("", rendered)) - set(mark))):
            return
        said = "".join(text for _, text in leaves(messages[-1]))
        if said.strip() and not set(self._encode(said).tolist()) - {unknown}:
            raise self._error(
                name,
                f"the tokenizer has no token for any of {said[:40]!r}, so the model would see none "
                "of it: drop it, or use a model whose tokenizer can write it",
            )
        self.unwritten.append(name)

    def _writes(self, character: str) -> bool:
        """Whether the tokenizer does not drop a character."""
        if character not in self._has_token:
            self._has_token[character] = character.isspace() or bool(len(self._encode(character)))
        return self._has_token[character]

    @cached_property
    def _added(self) -> re.Pattern[str]:
        """Tokens whose letters need be no tokens."""
        return _any_of(each.content for each in self.tokenizer.added_tokens_decoder.values())

    def _require_short(self, name: str, text: str, max_tokens: int) -> None:
        """Raise DataError where `text` cannot be so few tokens: to count them takes 400 bytes for each.

        A tokenizer that composes letters (NFC) holds more, but no text is of its longest tokens alone.
        """
        if len(text) > (most := max_tokens * self._longest_token):
            raise self._error(
                name,
                f"it has {len(text):,} characters, of which the limit of {max_tokens} tokens holds {most:,}: "
                "raise the limit or drop it",
            )

    @cached_property
    def _longest_token(self) -> int:
        """In characters, or bytes where its vocabulary is of those: at least as many."""
        return max(map(len, self.tokenizer.get_vocab()))

    def _prompt(self, rendered: str, mark: str, name: str, max_tokens: int) -> Tokens:
        self._require_short(name, rendered.replace(mark, ""), max_tokens)
        tokens = self._encode_split(rendered, mark, name)
        if not len(tokens):
            raise self._error(name, "the chat template renders an empty prompt")
        if len(tokens) > max_tokens:
            raise self._error(
                name,
                f"the prompt has {len(tokens)} tokens, above the limit of {max_tokens}: "
                "raise the limit or drop the prompt",
            )
        return tokens

    def _encode_split(self, rendered: str, mark: str, name: str) -> Tokens:
        """Ids of `rendered`, in which `mark` divides what is no control token.

        Raises DataError for a tokenizer that has no other way to write it.
        """
        if not mark or mark not in rendered:
            return self._encode(rendered)
        tokens = np.concatenate([self._encode(part) for part in rendered.split(mark)])
        written = self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if written != rendered.replace(mark, ""):
            raise self._error(
                name, "it spells out a control token, which this tokenizer cannot write as text: take it out"
            )
        return tokens

    def _rendered(
        self, asked: Sequence[Named], requests: Sequence[tuple[Sequence[Message], bool]]
    ) -> Iterator[str]:
        """Each of `requests` (messages, open_turn) as text. DataError naming the sample that it is of."""
        texts = bounded(lambda request: self._render(*request), requests, TEMPLATE_SECONDS)
        for (name, _), rendered in zip(asked, texts, strict=False):
            if isinstance(rendered, Failed):
                raise self._refused(name, rendered)
            yield rendered

    def _refused(self, name: str, failed: Failed) -> DataError:
        return self._error(name, f"the chat template refuses it: {failed.reason}")

    def _error(self, name: str, what: str) -> DataError:
        """That of a sample `what` is wrong, with this model: it may be the sample's fault, or the model's."""
        return DataError(f"{name}: {what} ({self._model_dir})")

    def _render(self, messages: Sequence[Message], open_turn: bool) -> str:
        rendered: str = self.tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=open_turn,
            chat_template=self._template,
        )
        if len(rendered) > LONGEST_TEXT:
            raise ValueError(f"it makes {len(rendered):,} characters of it, above {LONGEST_TEXT:,}")
        if half := _HALF.search(rendered):
            raise ValueError(f"it prints {half[0]!a}, half a character (a lone surrogate)")
        return rendered

    def _encode(self, text: str) -> Tokens:
        # The template has put in every special token there is to be, and they are tokens whatever the
        # tokenizer's own settings say of text. What is too long is refused, and needs no warning before.
        ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False, verbose=False)
        return np.array(ids, dtype=np.int32)


def _any_of(words: Any) -> re.Pattern[str]:
    """The longest first: a token takes precedence over one within it."""
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or "(?!)")
