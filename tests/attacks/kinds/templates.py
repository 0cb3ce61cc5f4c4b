"""Chat templates: text of the messages alone, all of them, in bounded time and memory, or a refusal."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from tests.attacks.attack import Attack
from tests.attacks.changes import ODD_TEXT, Long, byte_changes, special_changes
from tests.model_zoo import CHAT_TEMPLATE

FRAGMENTS = (
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(10**9) %}x{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{{ ('a' * 10**6) * 10**4 }}",
    "{{ 10**10**8 }}",
    "{{ [1] * 10**10 }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ 'a'.ljust(10**10) }}",
    "{{ 'a'|center(10**10) }}",
    "{{ ''|indent(10**10) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% set n = namespace(a='x') %}{% for i in range(60) %}{% set n.a = n.a + n.a %}{% endfor %}{{ n.a }}",
    "{{ messages.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch ../outside/pwned') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
    "{{ messages[0].update({'content': 'x'}) }}",
    "{{ messages[0].items }}",
    "{{ namespace }}",
    "{{ range }}",
    "{{ messages }}",
    "{{ [1, 2, 3, 4, 5, 6, 7, 8, 9]|random }}",
    "{{ lipsum() }}",
    "{{ strftime_now('%Y-%m-%d %H:%M:%S.%f') }}",
    "{{ strftime_now('%s') }}",
    "{{ strftime_now('%x %X %c %G %V %N %q') }}",
    "{{ strftime_now }}",
    "{% set now = strftime_now %}{{ now('%H:%M:%S.%f') }}",
    "{% macro strftime_now(f) %}y{% endmacro %}{{ strftime_now('%Y') }}",
    "{{ raise_exception('no') }}",
    "{{ raise_exception('a\nb\x1b[31m') }}",
    "{{ raise_exception() }}",
    "{{ raise_exception(messages) }}",
    "{{ 1 / 0 }}",
    "{{ undefined.x }}",
    "{{ undefined }}",
    "{{ messages[99].content }}",
    "{{ messages[0]['nope']['deeper'] }}",
    "{{ 'x'|int(base=99) }}",
    "{{ 'x'.encode('nope') }}",
    "{{ [1, 'a']|sort }}",
    "{{ 'a' + 1 }}",
    "{{ {}[[]] }}",
    "{{ messages|tojson(indent=99999999) }}",
    "{{ messages|map('nope') }}",
    "{{ messages|nope }}",
    "{% include '/etc/passwd' %}",
    "{% extends 'other' %}",
    "{% import 'other' as other %}",
    "{% for %}",
    "{% if %}",
    "{{",
    "{#",
    "{% raw %}",
    "{% generation %}x{% endgeneration %}",
    "{% break %}",
    "{{ '<|end|>' }}",
    "{{ bos_token }}{{ eos_token }}{{ tools }}{{ documents }}",
    "{" * 5000,
    "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}",
    "{{ " + "+".join(["1"] * 20_000) + " }}",
    "{% if true %}" * 500 + "{% endif %}" * 500,
    "x" * 3_000_000,
    "{% set messages = [] %}",
    "{% set messages = messages[:0] %}",
    "{% set add_generation_prompt = false %}",
)


@dataclass(frozen=True)
class Inserted:
    """`text` in the template's own, before the `at`th of the characters that a tag begins with."""

    text: str
    at: int

    def template(self) -> str:
        places = [index for index in range(len(CHAT_TEMPLATE)) if CHAT_TEMPLATE.startswith("{%", index)]
        place = [*places, len(CHAT_TEMPLATE)][self.at % (len(places) + 1)]
        return CHAT_TEMPLATE[:place] + self.text + CHAT_TEMPLATE[place:]


@dataclass(frozen=True)
class File:
    """The template's file itself."""

    change: Any


@dataclass(frozen=True)
class Named:
    """tokenizer_config.json's `chat_template`, and no file beside it."""

    value: Any


SECONDS = 1.0  # of processor for a rendering here, which takes a millisecond where it ends at all


class Templates(Attack[Any]):
    """Loops, recursion, size, what reaches beyond the sandbox, clocks, dice, and errors of every type."""

    name = "templates"
    seconds = 130.0  # a rendering may take SECONDS to compute, and 120 s to wait for that
    copies = ("student",)
    examples = 4

    def changes(self) -> SearchStrategy[Any]:
        value = st.one_of(
            st.sampled_from(
                [
                    None,
                    [],
                    {},
                    5,
                    "",
                    [{"name": "other", "template": CHAT_TEMPLATE}],
                    [{"name": "default", "template": CHAT_TEMPLATE}, {"name": "tool_use", "template": "x"}],
                    {"default": CHAT_TEMPLATE},
                    [{"name": "default"}],
                    [["default", CHAT_TEMPLATE]],
                    {"default": 5},
                ]
            ),
            st.sampled_from(ODD_TEXT),
        )
        return st.one_of(
            st.builds(
                Inserted,
                st.one_of(st.sampled_from([Long(each) for each in FRAGMENTS]), st.sampled_from(ODD_TEXT)),
                st.integers(0, 12),
            ),
            st.builds(Inserted, st.sampled_from([Long(each) for each in FRAGMENTS]), st.integers(0, 12)),
            st.builds(File, st.one_of(byte_changes, special_changes)),
            st.builds(Named, value),
        )

    def spoil(self, world: Path, change: Any) -> None:
        path = world / "student" / "chat_template.jinja"
        if isinstance(change, Inserted):
            path.write_bytes(change.template().encode("utf-8", "surrogatepass"))
        elif isinstance(change, File):
            change.change(path)
        else:
            path.unlink()
            config = path.with_name("tokenizer_config.json")
            config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": change.value}))

    def use(self, world: Path, change: Any) -> str:
        """Tokens of a prompt, twice: with another clock, other dice and other objects the second time."""
        import datetime
        import random

        import transformers.utils.chat_template_utils as clocked

        from megatron_lopd.artifacts.fingerprint import fingerprint_model
        from megatron_lopd.data import chat as chats
        from megatron_lopd.data.chat import Chat

        chats.TEMPLATE_SECONDS = SECONDS

        class Later(datetime.datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Any:
                return datetime.datetime(2031, 2, 3, 4, 5, 6, 789)

        fingerprint_model("student")
        seen = []
        kept = []  # so that what is made later lies elsewhere
        for number in range(2):
            random.seed(number)
            prompt = [{"role": "user", "content": "1+2+3="}]
            answered = [*prompt, {"role": "assistant", "content": "6"}]
            kept.append((prompt, answered, object()))
            chat = Chat("student")
            tokens = chat.prompt(prompt, "a sample", 100_000).tolist()
            answer = [each.tolist() for each in chat.conversation(answered, "a sample", 100_000, "the limit")]
            seen.append({"prompt": tokens, "answer": answer, "text": chat.tokenizer.decode(tokens)})
            clocked.datetime = Later
            clocked.compiled = None
            for cached in vars(clocked).values():
                if hasattr(cached, "cache_clear"):
                    cached.cache_clear()
        return json.dumps({**seen[0], "again": seen[0] == seen[1]})

    def allows(self, change: Any, before: str, after: str) -> bool:
        """Another template may write what it likes around the question, and the answer must be trained on."""
        found = json.loads(after)
        answer = "".join(_decode(found["answer"][1]))
        return found["again"] and "1+2+3=" in found["text"] and "6" in answer


def _decode(tokens: list[int]) -> list[str]:
    from tests.attacks.kinds.prompts import VOCABULARY

    return [VOCABULARY[token] for token in tokens]
