"""Make the quickstart's tokenizer: one token for each character of the task, and a ChatML-like template.

python examples/quickstart/make_tokenizer.py examples/quickstart/tokenizer
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<|pad|>", "<|unk|>", "<|im_start|>", "<|im_end|>"]
ROLES = ["user", "assistant"]
CHARACTERS = list("0123456789+-*=\n")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A fast tokenizer of 21 entries: an odd number on purpose, so that tensor parallelism must pad it."""
    words = SPECIAL + ROLES + CHARACTERS
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = Split(Regex("|".join([*ROLES, r"[\s\S]"])), behavior="isolated")
    # Without a decoder, decoded words are joined by spaces, and the text would not be what was encoded.
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the quickstart's tokenizer.")
    parser.add_argument("directory", type=Path, help="where to write the tokenizer's files")
    make_tokenizer().save_pretrained(parser.parse_args().directory)


if __name__ == "__main__":
    main()
