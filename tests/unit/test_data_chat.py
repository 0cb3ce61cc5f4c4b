from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_lopd.data.chat import Chat
from megatron_lopd.errors import ConfigError, DataError
from megatron_lopd.prompts.clock import without_clock

VOCABULARY = ["<pad>", "<|end|>", "<|turn|>", "user", "assistant", "\n", *"0123456789+=abc", "?", "stop"]
IDS = {token: index for index, token in enumerate(VOCABULARY)}
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}<|turn|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
CONVERSATION = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "=2"}]


def model_dir(path: Path, template: str | None = TEMPLATE, end: str | None = "<|end|>") -> str:
    tokenizer = Tokenizer(models.WordLevel(IDS, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("user|assistant|stop|."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, chat_template=template)
    fast.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|end|>"]})
    fast.save_pretrained(path)
    return str(path)


def text(tokens: object) -> list[str]:
    return [VOCABULARY[token] for token in tokens]  # type: ignore[attr-defined]


def test_prompt_and_conversation(tmp_path: Path) -> None:
    chat = Chat(model_dir(tmp_path))
    prompt, response = chat.conversation(CONVERSATION, "s", 100)
    assert text(prompt) == [
        *("<|turn|>", "user", "\n", "1", "+", "1", "?"),
        *("<|end|>", "\n", "<|turn|>"),
        *("assistant", "\n"),
    ]
    # The end token is in the loss; the line break the template puts after it is not.
    assert text(response) == ["=", "2", "<|end|>"]
    assert prompt.tolist() == chat.prompt(CONVERSATION[:1], "s", 100).tolist()
    assert chat.decode(response) == "=2"


def test_prompts_do_not_depend_on_the_clock(tmp_path: Path) -> None:
    """As Llama 3.2's template asks; the digits are in the vocabulary, and transformers tells today's."""
    dated = (
        "  {% if strftime_now is defined %}{% set today = strftime_now('%Y+%-m+%d') %}"
        "{% endif %}\n{{ today }}" + TEMPLATE
    )
    prompt = "".join(text(Chat(model_dir(tmp_path, dated)).prompt(CONVERSATION[:1], "s", 100)))
    assert prompt.startswith("2024+7+26<|turn|>")
    assert without_clock(TEMPLATE) == TEMPLATE


def test_end_tokens_come_from_both_files(tmp_path: Path) -> None:
    directory = model_dir(tmp_path)
    assert Chat(directory).end_tokens == {1}
    for named, expected in ((5, {1, 5}), ([5, 6], {1, 5, 6}), (None, {1})):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
        assert Chat(directory).end_tokens == expected


def test_an_end_token_in_the_middle_of_an_answer_is_refused(tmp_path: Path) -> None:
    directory = model_dir(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": IDS["stop"]}))
    twice = [CONVERSATION[0], {"role": "assistant", "content": "=2stop=3"}]
    with pytest.raises(DataError, match="s7: the answer goes on after its end token: '=3'"):
        Chat(directory).conversation(twice, "s7", 100)


def test_limits_name_the_sample(tmp_path: Path) -> None:
    chat = Chat(model_dir(tmp_path))
    assert len(chat.prompt(CONVERSATION[:1], "s7", 12)) == 12
    with pytest.raises(DataError, match="s7: the prompt has 12 tokens, above the limit of 11"):
        chat.prompt(CONVERSATION[:1], "s7", 11)
    assert chat.conversation(CONVERSATION, "s7", 15)
    with pytest.raises(DataError, match="s7: prompt and answer have 15 tokens, above the limit of 14"):
        chat.conversation(CONVERSATION, "s7", 14)


def test_what_cannot_be_so_few_tokens_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of texts of megabytes the tokenizer makes gigabytes, and aborts where there are none."""
    chat = Chat(model_dir(tmp_path))
    longest = len("assistant")  # of its tokens
    question = {"role": "user", "content": "1" * 12 * longest}
    monkeypatch.setattr(Chat, "_encode", lambda *unused: pytest.fail("it was counted"))
    for refused in (
        lambda: chat.prompt([question], "s7", 12),
        lambda: chat.conversation([question, CONVERSATION[1]], "s7", 12),
        lambda: chat.conversation([CONVERSATION[0], {"role": "assistant", "content": "1" * 999}], "s7", 99),
    ):
        with pytest.raises(
            DataError, match=r"s7: it has \S+ characters, of which the limit of \d+ tokens holds"
        ):
            refused()


def test_templates_that_cannot_be_trained_on(tmp_path: Path) -> None:
    no_end = TEMPLATE.replace("{{ message.content }}<|end|>", "{{ message.content }}")
    with pytest.raises(DataError, match=r"s: the chat template puts no end token \(<\|end\|>\)"):
        Chat(model_dir(tmp_path / "a", no_end)).conversation(CONVERSATION, "s", 100)
    other_opening = TEMPLATE.replace("assistant\n{% endif %}", "assistant\nstop{% endif %}")
    with pytest.raises(DataError, match="s: the chat template renders the prompt otherwise"):
        Chat(model_dir(tmp_path / "b", other_opening)).conversation(CONVERSATION, "s", 100)
    refused = rf"s: the chat template refuses it: no system role.* \({tmp_path}/c\)$"
    with pytest.raises(DataError, match=refused):
        Chat(model_dir(tmp_path / "c")).prompt([{"role": "system", "content": "a"}], "s", 100)


def test_unusable_directories(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such model directory"):
        Chat(str(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty: its tokenizer does not load"):
        Chat(str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="has no chat template"):
        Chat(model_dir(tmp_path / "a", template=None))
    with pytest.raises(ConfigError, match="no end token: set eos_token"):
        Chat(model_dir(tmp_path / "b", end=None))
