"""The tokenizer in the header of a GGUF file, as the files that transformers would have.

Facts: the GGUF specification's `tokenizer.ggml.*` keys, and what llama.cpp's `tokenizer.ggml.pre`
names stand for, which are the pre-tokenizers of the models they are called after.
"""

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from qcompiler.errors import ModelError
from qcompiler.export.exported import SideFile
from qcompiler.export.gguf_header import header

if TYPE_CHECKING:
    from gguf import GGUFReader

_CONTROL: Final = 3
_USER_DEFINED: Final = 4
_PREFIX: Final = "tokenizer.ggml."
_LLAMA_3_WORDS: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ROLES: Final = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _llama_3() -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(Regex(_LLAMA_3_WORDS), "isolated")
    return pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


_PRE_TOKENIZERS: Final[Mapping[str, Callable[[], pre_tokenizers.PreTokenizer]]] = {
    "gpt-2": _gpt2,
    "smollm": _smollm,
    "llama-bpe": _llama_3,
}


def read_tokenizer(reader: "GGUFReader") -> Tokenizer:
    """Return the tokenizer in a file's header.

    Raises:
        ModelError: It is of a kind that is unknown here, or the header lacks part of it.
    """
    kind, pre = header(reader, f"{_PREFIX}model"), header(reader, f"{_PREFIX}pre")
    if kind != "gpt2" or pre not in _PRE_TOKENIZERS:
        message = f"the tokenizer is of kind {kind} with pre-tokenizer {pre}"
        known = ", ".join(_PRE_TOKENIZERS)
        raise ModelError(message, hint=f"kind gpt2 with one of {known} can be read")
    tokens = _texts(reader, "tokens")
    merges = [_split(merge) for merge in _texts(reader, "merges")]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    kinds = header(reader, f"{_PREFIX}token_type") or []
    of_kind: dict[int, list[str]] = {_CONTROL: [], _USER_DEFINED: []}
    for token, number in zip(tokens, kinds, strict=False):
        of_kind.get(number, []).append(token)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in of_kind[_CONTROL]])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in of_kind[_USER_DEFINED]])
    _add_frame(tokenizer, reader)
    return tokenizer


def tokenizer_files(reader: "GGUFReader", context: int) -> tuple[SideFile, ...]:
    """Return `tokenizer.json` and `tokenizer_config.json`.

    Args:
        reader: The open file.
        context: Tokens that the model takes.

    Raises:
        ModelError: As of `read_tokenizer`.
    """
    tokens = _texts(reader, "tokens")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    for role, key in _ROLES.items():
        number = header(reader, _PREFIX + key)
        if number is not None and 0 <= number < len(tokens):
            config[role] = tokens[number]
    template = header(reader, "tokenizer.chat_template")
    if template:
        config["chat_template"] = template
    return (
        SideFile("tokenizer.json", read_tokenizer(reader).to_str(pretty=True).encode()),
        SideFile("tokenizer_config.json", (json.dumps(config, indent=2) + "\n").encode()),
    )


def _texts(reader: "GGUFReader", name: str) -> list[str]:
    values = header(reader, _PREFIX + name)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        message = f"the header has no {_PREFIX}{name}, which a tokenizer is made of"
        raise ModelError(message)
    return values


def _split(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _add_frame(tokenizer: Tokenizer, reader: "GGUFReader") -> None:
    """Put the tokens before and after every text that the header asks for."""
    parts = ["$A"]
    special = []
    for role, place in (("bos", 0), ("eos", 2)):
        number = header(reader, f"{_PREFIX}{role}_token_id")
        token = None if number is None else tokenizer.id_to_token(number)
        if header(reader, f"{_PREFIX}add_{role}_token") and token is not None:
            parts.insert(place, token)
            special.append((token, number))
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=parts, special_tokens=special
        )
