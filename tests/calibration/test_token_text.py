"""Samples from texts and a tokenizer."""

import json
import sys
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from qcompiler.calibration.calls import SampleOptions, Samples
from qcompiler.calibration.samples import open_samples
from qcompiler.errors import UsageError
from tests.support.graphs import build

tokenizers = pytest.importorskip("tokenizers")

WORDS = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", *"abcdefghij"]
CLS, SEP, PAD = 1, 2, 3
A, B, C, D, E, F = range(4, 10)


def _model(batch: str = "b", length: str = "s") -> ir.Model:
    shape = f"int64[{batch}, {length}]"
    return build(
        f"g ({shape} input_ids, {shape} attention_mask) => (float y)"
        "{ y = Constant<value_float=1.0>() }"
    )


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return _tokenizer(tmp_path, special=True)


def _tokenizer(folder: Path, *, special: bool, **truncation: int) -> Path:
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if special:
        made.post_processor = tokenizers.processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS))
    made.enable_padding(pad_id=PAD, pad_token="[PAD]", length=32)
    if truncation:
        made.enable_truncation(**truncation)
    path = folder / "tokenizer.json"
    made.save(str(path))
    return path


def _text(tmp_path: Path, content: str, name: str = "t.txt") -> Path:
    (tmp_path / name).write_text(content, encoding="utf-8")
    return tmp_path / name


def _open(path: Path, model: ir.Model | None = None, **options: Any) -> Samples:
    return open_samples(str(path), model or _model(), SampleOptions(**options))


def _ids(samples: Samples) -> list[Any]:
    return [feeds["input_ids"].tolist() for feeds in samples]


def _refusal(path: Path, model: ir.Model | None = None, **options: Any) -> UsageError:
    with pytest.raises(UsageError) as caught:
        list(_open(path, model, **options))
    return caught.value


def test_each_text_is_a_call_of_its_own_length(tmp_path: Path, tokenizer: Path) -> None:
    samples = _open(_text(tmp_path, "a b c\n\n  \nd\r\n"), tokenizer=tokenizer)
    assert _ids(samples) == [[[CLS, A, B, C, SEP]], [[CLS, D, SEP]]]
    assert samples.origin == "2 calls from t.txt (2 texts)"
    assert samples.fingerprint() == samples.fingerprint()


def test_texts_of_a_batch_are_padded_to_the_longest(tmp_path: Path, tokenizer: Path) -> None:
    samples = _open(_text(tmp_path, "a b\nc\nd"), tokenizer=tokenizer, batch_size=2)
    first, second = samples
    assert first["input_ids"].tolist() == [[CLS, A, B, SEP], [CLS, C, SEP, PAD]]
    assert first["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert second["input_ids"].tolist() == [[CLS, D, SEP]]


def test_texts_are_packed_into_windows_of_one_length(tmp_path: Path) -> None:
    path = _tokenizer(tmp_path, special=False)
    samples = _open(_text(tmp_path, "a b c\nd\ne f a b"), tokenizer=path, sequence_length=3)
    assert _ids(samples) == [[[A, B, C]], [[D, E, F]]]
    assert samples.origin == "2 calls from t.txt (2 windows of 3 tokens)"
    first = next(iter(samples))
    assert first["attention_mask"].tolist() == [[1, 1, 1]]


def test_windows_have_the_special_tokens_of_a_text(tmp_path: Path, tokenizer: Path) -> None:
    text = _text(tmp_path, "a b c\nd e f")
    samples = _open(text, tokenizer=tokenizer, sequence_length=4, batch_size=2)
    assert _ids(samples) == [
        [[CLS, A, B, SEP], [CLS, C, D, SEP]],
        [[CLS, E, F, SEP]],
    ]


def test_the_limit_and_padding_of_the_tokenizer_do_not_reach_into_windows(tmp_path: Path) -> None:
    path = _tokenizer(tmp_path, special=True, max_length=3)
    samples = _open(_text(tmp_path, "a b c d e f"), tokenizer=path, sequence_length=5)
    assert _ids(samples) == [[[CLS, A, B, C, SEP]], [[CLS, D, E, F, SEP]]]


def test_texts_end_where_the_tokenizer_or_the_user_says(tmp_path: Path) -> None:
    path = _tokenizer(tmp_path, special=True, max_length=4)
    text = _text(tmp_path, "a b c d e f")
    assert _ids(_open(text, tokenizer=path)) == [[[CLS, A, B, SEP]]]
    assert _ids(_open(text, tokenizer=path, max_tokens=5)) == [[[CLS, A, B, C, SEP]]]


@pytest.mark.parametrize("length", [None, 3])
def test_max_samples_counts_texts_or_windows(
    length: int | None, tmp_path: Path, tokenizer: Path
) -> None:
    text = _text(tmp_path, "a\nb\nc\nd\ne")
    samples = _open(text, tokenizer=tokenizer, sequence_length=length, max_samples=4, batch_size=2)
    assert len(samples) == len(list(samples)) == 2
    assert sum(len(rows) for rows in _ids(samples)) == 4


def test_a_batch_that_the_model_fixes_drops_what_is_left(tmp_path: Path, tokenizer: Path) -> None:
    text = _text(tmp_path, "a\nb\nc")
    samples = _open(text, _model("2"), tokenizer=tokenizer)
    assert _ids(samples) == [[[CLS, A, SEP], [CLS, B, SEP]]]
    assert samples.origin == "1 call from t.txt (2 texts)"
    assert _refusal(text, _model("2"), tokenizer=tokenizer, batch_size=3).where == "batch_size"
    error = _refusal(text, _model("4"), tokenizer=tokenizer)
    assert error.message == "holds 3 texts, and a call takes 4"


def test_a_length_that_the_model_fixes(tmp_path: Path, tokenizer: Path) -> None:
    text = _text(tmp_path, "a b c")
    model = _model("b", "6")
    assert _ids(_open(text, model, tokenizer=tokenizer)) == [[[CLS, A, B, C, SEP, PAD]]]
    error = _refusal(text, model, tokenizer=tokenizer, sequence_length=5)
    assert error.message == "the model takes 6 tokens, not 5"


def test_lines_of_json_hold_texts_in_a_field(tmp_path: Path, tokenizer: Path) -> None:
    lines = [{"text": "a b", "other": "x"}, {"text": "c\nd", "other": "y"}]
    text = _text(tmp_path, "\n".join(map(json.dumps, lines)) + "\n\n", "t.jsonl")
    assert _ids(_open(text, tokenizer=tokenizer)) == [[[CLS, A, B, SEP]], [[CLS, C, D, SEP]]]
    error = _refusal(text, tokenizer=tokenizer, text_field="body")
    assert error.message == "has no text field 'body'; it holds other, text"
    assert error.where == f"{text}, line 1"


@pytest.mark.parametrize("line", ["{", "[1]", '{"text": 1}', "[" * 200_000])
def test_lines_that_hold_no_text_are_named(line: str, tmp_path: Path, tokenizer: Path) -> None:
    text = _text(tmp_path, f'{{"text": "a"}}\n{line}\n', "t.jsonl")
    assert _refusal(text, tokenizer=tokenizer).where == f"{text}, line 2"


def test_a_window_must_hold_more_than_special_tokens(tmp_path: Path, tokenizer: Path) -> None:
    error = _refusal(_text(tmp_path, "a"), tokenizer=tokenizer, sequence_length=2)
    assert error.message == "2 leaves no place beside 2 special tokens"


def test_too_little_text_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    error = _refusal(_text(tmp_path, "a b"), tokenizer=tokenizer, sequence_length=8)
    assert error.message == "holds 0 windows of 8 tokens, and a call takes 1"


def test_text_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    error = _refusal(_text(tmp_path, "a"))
    assert (error.message, error.hint) == ("texts need a tokenizer", "--tokenizer tokenizer.json")


@pytest.mark.parametrize("content", ["", "{}", "\x00"])
def test_what_is_no_tokenizer_is_refused(content: str, tmp_path: Path) -> None:
    path = _text(tmp_path, content, "tokenizer.json")
    error = _refusal(_text(tmp_path, "a"), tokenizer=path)
    assert error.message.startswith("cannot be read as a tokenizer: ")
    assert _refusal(_text(tmp_path, "a"), tokenizer=tmp_path / "none.json").where


def test_text_that_is_not_utf8_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"a\n\xff\xfe\n")
    assert "cannot be read as UTF-8" in _refusal(tmp_path / "t.txt", tokenizer=tokenizer).message


def test_a_missing_package_is_named_with_the_command(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    error = _refusal(_text(tmp_path, "a"), tokenizer=tokenizer)
    assert error.hint == 'pip install "qcompiler[text]"'
