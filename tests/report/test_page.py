"""The page: everything of the report is in it, nothing of it is markup, and it loads nothing."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qcompiler.cli.main import main
from qcompiler.errors import UsageError
from qcompiler.report.files import read_report, report_json
from qcompiler.report.page import page_of_file, report_html
from tests.support.reports import HOSTILE, full_report


class _Tags(HTMLParser):
    """Collects elements, and what the page would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.handlers: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action") and not (value or "").startswith("#"):
                self.loads.append(f"{tag} {name} {value}")
            if name.startswith("on"):
                self.handlers.append(f"{tag} {name}")


def test_every_part_of_the_report_is_on_the_page() -> None:
    text = report_html(full_report())
    for anchor in re.findall(r'<section id="(\w+)"', text):
        assert f'<a href="#{anchor}">' in text
    expected = (
        *("2.0 MiB", "4.00 times smaller", "8.08", "24.5 dB", "3.00 ms", "2 of 3", "0.805"),
        *("a warning about first", "reason of second", "QLinearMatMul", "assign-schemes"),
        *("default = &#34;w8a8&#34;", "--metric mine:accuracy", "--user-pass my:pass", "ab" * 32),
        *('id="accuracy"', 'id="windows"', 'id="islands"', 'id="channels"', 'id="float"'),
        *('id="search"', "mix of first", "fails: third is slow", "it takes 4.28 bits", "24.5"),
        *("8 of 9 weights as planned", "planned as INT8, found as FLOAT16", "first is slow"),
        *(
            "31",
            "ops compute in float16, 5 in float32",
            "Computes in float32, since range of second",
        ),
        *("qcompile reproduce first.w8a8.manifest.json first.onnx",),
        *("window 2 (not kept)", "calibrated by mse on 4 calls"),
        *("50.00 %", "outside", "2.00% of the weights in column islands"),
        *("+1 MatMul", "as first asks", "no kernel for third", "The MIT License"),
    )
    for part in expected:
        assert part in text, part


def test_sections_without_data_are_left_out() -> None:
    bare = replace(
        full_report(),
        windows=(),
        islands=None,
        channels=(),
        search=None,
        calibration=None,
        nodes=(),
    )
    text = report_html(bare)
    for anchor in ("accuracy", "windows", "islands", "channels", "float", "search"):
        assert f'id="{anchor}"' not in text
    assert 'id="nodes"' in text


def test_names_do_not_become_markup() -> None:
    plain = _Tags(report_html(full_report("a", "b", "c")))
    hostile = _Tags(report_html(full_report(HOSTILE, f"{HOSTILE}'\"", "{{ 7 * 7 }}")))
    assert hostile.tags == plain.tags
    assert not hostile.handlers
    assert "{{ 7 * 7 }}" in report_html(full_report("{{ 7 * 7 }}"))


def test_the_page_loads_nothing_and_runs_only_its_own_scripts() -> None:
    text = report_html(full_report())
    tags = _Tags(text)
    assert not tags.loads
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(scripts) == 2
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"sha256-{digest}" in policy[1].replace("&#43;", "+")
    assert policy[1].startswith("default-src &#39;none&#39;")


def test_a_report_read_back_gives_the_same_page(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(report_json(full_report()))
    assert read_report(path) == full_report()
    assert report_html(read_report(path)) == report_html(full_report())


@pytest.mark.parametrize(
    "changes",
    [
        {"windows": [{"blocks": "w"}]},
        {"windows": 3},
        {"islands": {"kind": "column", "sites": []}},
        {"islands": {"sites": [{"name": "w"}]}},
        {"settings": {"user_passes": 3}},
        {"metric": {"name": "m", "source": "high", "compiled": "low"}},
        {"channels": [3]},
        {"target": 3},
    ],
)
def test_a_file_of_the_wrong_form_is_refused(changes: dict[str, object], tmp_path: Path) -> None:
    content = json.loads(report_json(full_report()))
    path = tmp_path / "r.json"
    path.write_text(json.dumps({**content, **changes}))
    with pytest.raises(UsageError, match=r"r\.json"):
        page_of_file(path)
    first = {**content["nodes"][0], "sqnr_db": "high"}
    path.write_text(json.dumps({**content, "nodes": [first]}))
    with pytest.raises(UsageError, match="cannot be shown"):
        page_of_file(path)


def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.report.json").write_text(report_json(full_report()))
    for arguments, name in (([], "m.report.html"), (["-o", str(tmp_path / "p.html")], "p.html")):
        with pytest.raises(SystemExit) as stop:
            main(["report", str(tmp_path / "m.report.json"), *arguments])
        assert not stop.value.code, capsys.readouterr().err
        assert (tmp_path / name).read_text() == report_html(full_report())
