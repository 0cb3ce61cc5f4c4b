"""Text that does harm: templates that fail in every way, rows that lose what they say, spelled-out tokens."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

# Each is a whole chat template that no sample gets through; with words of the line that says so.
FAILING_TEMPLATES = {
    "{{ messages[0].content.split('') }}": "separator",
    "{{ raise_exception('no\nroles') }}": "no roles",
    "{{ 1 / 0 }}": "division",
    "{{ messages.absent.key }}": "no attribute",
    "{{ messages | nosuchfilter }}": "nosuchfilter",
    "{% for m in messages %}": "end of template",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recursion",
    "{{ 'a'.encode('utf-7', 'x').decode('no-such') }}": "refuses it",
    "{{ ''.join(messages) }}": "refuses it",
    "{{ 10 ** 400 / 3.0 }}": "refuses it",
    "{{ messages[5].content }}": "no element",
    "{{ messages.__class__.__mro__ }}": "refuses it",
    "{% for i in range(10 ** 9) %}{% endfor %}": "Range too big",
    "{{ 'x' * 10 ** 11 }}": "more than",
    "{{ '%2000000000d' % 1 }}": "more than",
    "{{ messages[0].content * 10 ** 8 }}": "characters of it",
    "{{ '\\ud800' }}{{ messages[0].content }}": r"'\ud800', half a character",
}
# Those that never come to an end, in Python and in C.
ENDLESS_TEMPLATES = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 9 ** (9 ** 9) }}",
    "{{ messages[0].content ~ (7 ** 9999999 % 10) ~ (7 ** 99999999) }}",
)
ROLES = ("system", "user", "assistant", "tool", "developer")


def messages(alphabet: str) -> st.SearchStrategy[list[dict[str, Any]]]:
    """Conversations that end with a question, some with keys that few templates know."""
    text = st.text(alphabet, min_size=1, max_size=12).filter(lambda each: bool(each.strip()))
    extra = st.dictionaries(st.sampled_from(["reasoning_content", "name", "weight"]), text, max_size=1)
    message = st.builds(
        lambda role, content, more: {"role": role, "content": content, **more},
        st.sampled_from(ROLES),
        text,
        extra,
    )
    question = st.builds(lambda content: {"role": "user", "content": content}, text)
    return st.builds(lambda before, last: [*before, last], st.lists(message, max_size=4), question)
