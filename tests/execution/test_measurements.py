import json
from pathlib import Path

import onnxruntime
import pytest

from qcompiler.errors import UsageError
from qcompiler.execution.latency import Timing
from qcompiler.execution.measurements import Measurement, Measurements, machine_name

ENTRY = Measurement(
    "MatMul on [4, 8]",
    "a machine",
    {"float": Timing(1.5, 1.0, 1.0, 1.0), "planned": Timing(0.9001, 0.6, 0.55, 0.64)},
)


def test_what_is_kept_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    kept = Measurements(path)
    assert kept.get("key") is None
    kept.put("key", ENTRY)
    kept.save()
    assert Measurements(path).get("key") == ENTRY
    assert [file.name for file in tmp_path.iterdir()] == ["m.json"]


def test_new_entries_are_added_in_one_order(tmp_path: Path) -> None:
    texts = []
    for order in ("ab", "ba"):
        path = tmp_path / order
        for key in order:
            measurements = Measurements(path)
            measurements.put(key, ENTRY)
            measurements.save()
        texts.append(path.read_bytes())
    assert texts[0] == texts[1]
    assert set(json.loads(texts[0])["measurements"]) == {"a", "b"}


def test_a_file_to_which_nothing_was_added_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    Measurements(path).save()
    assert not path.exists()


def test_without_a_file_nothing_is_kept() -> None:
    measurements = Measurements(None)
    measurements.put("key", ENTRY)
    measurements.save()
    assert measurements.get("key") == ENTRY


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no JSON"),
        ("\xff", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("{}", "malformed"),
        ("[]", "malformed"),
        ('{"schema": "other", "schema_version": 1}', "it is not qcompiler-measurements"),
        ('{"schema": "qcompiler-measurements", "schema_version": 2}', "of version 1"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "m.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(UsageError, match=reason) as caught:
        Measurements(path)
    assert caught.value.where == str(path)
    assert caught.value.hint == "remove it to measure again"


@pytest.mark.parametrize(
    "numbers", [[], [1, 1, 1], [1, 1, 1, "x"], [1, 1, 1, -1], [1, 1, 1, float("nan")], 7, None]
)
def test_numbers_that_are_no_timing_are_refused(tmp_path: Path, numbers: object) -> None:
    path = tmp_path / "m.json"
    row = {"what": "w", "machine": "m", "timings": {"float": numbers}}
    content = {
        "schema": "qcompiler-measurements",
        "schema_version": 1,
        "measurements": {"key": row},
    }
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="an entry is malformed"):
        Measurements(path)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        Measurements(tmp_path)


def test_a_folder_that_does_not_exist_cannot_be_written(tmp_path: Path) -> None:
    measurements = Measurements(tmp_path / "none" / "m.json")
    measurements.put("key", ENTRY)
    with pytest.raises(UsageError):
        measurements.save()


def test_the_machine_is_named_with_what_latency_depends_on() -> None:
    assert onnxruntime.__version__ in machine_name(None)
    assert machine_name(None) != machine_name(1) != machine_name(2)
