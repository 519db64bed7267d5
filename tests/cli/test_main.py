"""The command line: what it prints, where it writes, and its exit codes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.cli.main import main
from tests.conftest import Golden
from tests.support.graphs import build, random_array

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Run the command in this process; gives exit status, standard output and error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        text = capsys.readouterr()
        return int(stop.value.code or 0), text.out, text.err

    handler = signal.getsignal(signal.SIGTERM)
    yield call
    signal.signal(signal.SIGTERM, handler)


def test_compile_writes_model_report_and_manifest(run: Run, digits: Path, tmp_path: Path) -> None:
    status, out, _ = run(digits, "-o", tmp_path / "out.onnx")
    assert status == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "out.manifest.json",
        "out.onnx",
        "out.report.html",
        "out.report.json",
    ]
    assert "6 of 8 weight ops quantized" in out
    assert "No scheme was asked for" in out
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert (report["schema"], report["schema_version"]) == ("qcompiler-report", 1)
    assert report["output"]["bytes"] == (tmp_path / "out.onnx").stat().st_size


def test_without_o_the_output_lies_beside_the_model(run: Run, digits: Path, tmp_path: Path) -> None:
    model = tmp_path / "m.onnx"
    model.write_bytes(digits.read_bytes())
    status, _, _ = run(model, "--scheme", "w4a16:b32")
    assert status == 0
    assert (tmp_path / "m.w4a16-b32.onnx").exists()


def test_the_report_can_be_printed_as_json(run: Run, digits: Path, tmp_path: Path) -> None:
    status, out, _ = run(digits, "-o", tmp_path / "out.onnx", "--report", "json")
    assert status == 0
    assert json.loads(out) == json.loads((tmp_path / "out.report.json").read_text())


def test_two_runs_are_byte_identical(run: Run, digits: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        run(digits, "-o", tmp_path / folder / "out.onnx", "--scheme", "w4a16:b32")
    for name in ("out.onnx", "out.manifest.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_explain_names_scheme_rule_reason_and_kernel(
    run: Run, digits: Path, tmp_path: Path
) -> None:
    run(digits, "-o", tmp_path / "out.onnx", "--scheme", "w4a16:b32")
    status, out, _ = run("explain", tmp_path / "out.onnx", "node_linear")
    assert status == 0
    for word in ("w4a16:b32", "recipe default asks for it", "MatMulNBits", "dB"):
        assert word in out
    status, out, _ = run("explain", tmp_path / "out.onnx", "node_Conv_82")
    assert "no convolution kernel for weights below 8 bits" in out
    status, _, err = run("explain", tmp_path / "out.onnx", "node_linaer")
    assert status == 2
    assert "node_linear" in err


def test_explain_works_without_a_report(run: Run, digits: Path, tmp_path: Path) -> None:
    run(digits, "-o", tmp_path / "out.onnx", "--scheme", "w4a16:b32")
    (tmp_path / "out.report.json").unlink()
    status, out, _ = run("explain", tmp_path / "out.onnx", "node_linear*")
    assert status == 0
    assert out.count("\n  scheme ") == 3


def test_inspect_lists_sites_and_blocks(run: Run, digits: Path) -> None:
    status, out, _ = run("inspect", digits)
    assert status == 0
    assert "node_linear_1" in out
    assert "[384, 128]" in out or "[128, 384]" in out
    status, out, _ = run("inspect", digits, "--json")
    found = json.loads(out)
    assert len(found["sites"]) == 8
    assert found["ops"]["BatchNormalization"] == 5
    assert len(found["blocks"]) > 3


def test_passes_run_one_by_one_reach_the_same_model(run: Run, digits: Path, tmp_path: Path) -> None:
    from qcompiler.options import CompileOptions
    from qcompiler.pipeline import pipeline
    from qcompiler.plan import make_plan

    model = digits
    names = [each.name for each in pipeline(make_plan(CompileOptions(scheme="w4a16:b32")))]
    for index, name in enumerate(names):
        output = tmp_path / f"{index:02d}.onnx"
        status, _, err = run("run-pass", name, model, "-o", output, "--scheme", "w4a16:b32")
        assert status == 0, err
        model = output
    run(digits, "-o", tmp_path / "whole.onnx", "--scheme", "w4a16:b32")
    one, whole = ir.load(model), ir.load(tmp_path / "whole.onnx")
    assert [n.op_type for n in one.graph] == [n.op_type for n in whole.graph]
    for name, value in whole.graph.initializers.items():
        other = one.graph.initializers[name].const_value
        assert value.const_value is not None
        assert other is not None
        assert value.const_value.tobytes() == other.tobytes()


def test_dump_ir_writes_a_valid_model_after_every_pass(
    run: Run, digits: Path, tmp_path: Path
) -> None:
    import onnxruntime

    from qcompiler.options import CompileOptions
    from qcompiler.pipeline import pipeline
    from qcompiler.plan import make_plan

    run(digits, "-o", tmp_path / "out.onnx", "--dump-ir", tmp_path / "ir")
    dumped = sorted((tmp_path / "ir").iterdir())
    assert len(dumped) == len(pipeline(make_plan(CompileOptions())))
    for path in dumped:
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def test_verify_numerics_reports_every_change(run: Run, digits: Path, tmp_path: Path) -> None:
    status, _, err = run(digits, "-o", tmp_path / "out.onnx", "--verify", "numerics")
    assert status == 0, err
    checks = json.loads((tmp_path / "out.report.json").read_text())["output_checks"]
    by_pass = {check["name"]: check for check in checks}
    assert by_pass["fold-batch-norm"]["max_rel"] < 1e-5
    assert by_pass["insert-qdq"]["sqnr_db"] > 30


def test_a_user_pass_that_breaks_the_numbers_is_shown(
    run: Run, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "breaking_pass.py").write_text(
        "import onnx_ir as ir\n"
        "def relu_to_neg(model: ir.Model) -> None:\n"
        "    for node in model.graph:\n"
        "        if node.op_type == 'Relu':\n"
        "            node.op_type = 'Neg'\n"
    )
    monkeypatch.chdir(tmp_path)
    arguments = ("--user-pass", "breaking_pass:relu_to_neg", "--verify", "numerics")
    status, _, err = run(digits, "-o", tmp_path / "out.onnx", *arguments)
    assert status == 0, err
    checks = json.loads((tmp_path / "out.report.json").read_text())["output_checks"]
    found = [check["sqnr_db"] for check in checks if check["name"] == "run-user-pass"]
    assert found
    assert found[0] < 10


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["missing.onnx"], 2, "cannot be read"),
        (["{digits}", "--scheme", "w5a16"], 2, "'w5a16' is not a scheme"),
        (["{digits}", "--scheme", "w4a16:b48"], 2, "is not a power of two"),
        (["{digits}", "--target", "onnxruntme"], 2, "onnxruntime"),
        (["{digits}", "--exclude", "node_linaer"], 2, "matches no quantizable op"),
        (["{digits}", "--recipe", "{bad}"], 2, "bad.toml"),
        (["{digits}", "--recipe", "{bad}", "--scheme", "w8a16"], 2, "already says which scheme"),
        (["{digits}", "--user-pass", "nowhere:f"], 2, "cannot import nowhere"),
        (["{digits}", "-o", "{tmp}/no/such/folder/out.onnx"], 2, "the folder does not exist"),
        (["{digits}", "-o", "{tmp}"], 2, "is a folder"),
        (["{digits}", "-o", "{digits}"], 2, "would overwrite the model"),
        (["{digits}", "--no-such-option"], 2, "No such option"),
        (["{text}"], 3, "is not an ONNX model"),
        (["run-pass", "fuse-everything", "{digits}", "-o", "{tmp}/o.onnx"], 2, "no pass is called"),
        (["run-pass", "insert-qdq", "{digits}", "-o", "{tmp}/o.onnx"], 2, "needs a model at stage"),
        (["inspect", "{text}"], 3, "is not an ONNX model"),
    ],
)
def test_bad_usage_is_one_clear_error(
    run: Run, digits: Path, tmp_path: Path, arguments: list[str], status: int, text: str
) -> None:
    (tmp_path / "bad.toml").write_text("version = 1\n[[rule]]\nnmae = 'x'\nscheme = 'w8a16'\n")
    (tmp_path / "text.onnx").write_text("this is no model")
    (tmp_path / "digits.onnx").write_bytes(digits.read_bytes())
    before = sorted(tmp_path.iterdir())
    names = {
        "digits": tmp_path / "digits.onnx",
        "bad": tmp_path / "bad.toml",
        "tmp": tmp_path,
        "text": tmp_path / "text.onnx",
    }
    found, _, err = run(*(argument.format(**names) for argument in arguments))
    assert found == status, err
    assert text in err
    assert "Traceback" not in err
    assert sorted(tmp_path.iterdir()) == before


def test_an_unexpected_failure_is_one_sentence(
    run: Run, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import qcompiler.back_off

    def fail(*_: object, **__: object) -> None:
        message = "surprise"
        raise RuntimeError(message)

    monkeypatch.setattr(qcompiler.back_off, "compile_model", fail)
    status, _, err = run(digits)
    assert status == 70
    assert err.startswith("internal error: RuntimeError: surprise")


def test_a_quantized_model_is_refused(run: Run, digits: Path, tmp_path: Path) -> None:
    model = build(
        """g (float[N, 64] x) => (float[N, 8] y) {
            [dq] w = DequantizeLinear<axis=1>(q, s)
            [mm] y = MatMul(x, w)
        }""",
        {"q": np.ones((64, 8), np.int8), "s": np.full(8, 0.1, np.float32)},
    )
    ir.save(model, tmp_path / "q.onnx")
    status, _, err = run(tmp_path / "q.onnx", "-o", tmp_path / "out.onnx")
    assert status == 3
    assert "quantized already" in err
    assert not (tmp_path / "out.onnx").exists()


def test_doctor_lists_versions(run: Run) -> None:
    status, out, _ = run("doctor")
    assert status == 0
    for word in ("qcompiler", "onnxruntime", "CPUExecutionProvider", "processor"):
        assert word in out


def test_lists(run: Run) -> None:
    _, passes, _ = run("--list", "passes")
    assert "fold-batch-norm" in passes
    _, targets, _ = run("--list", "targets")
    assert "onnxruntime" in targets
    _, schemes, _ = run("--list", "schemes")
    assert "w4a16:b128" in schemes


def test_help(run: Run, golden: Golden) -> None:
    status, out, _ = run("--help")
    assert status == 0
    golden.check("help.txt", out)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from qcompiler.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'numpy', 'onnx', 'onnx_ir', 'onnxruntime'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing(which: signal.Signals, tmp_path: Path) -> None:
    weights = {f"w{i}": random_array(1024, 1024, seed=i) for i in range(12)}
    lines = [f"h{i + 1} = MatMul(h{i}, w{i})" for i in range(12)]
    text = f"g (float[N, 1024] h0) => (float[N, 1024] h12) {{ {' '.join(lines)} }}"
    ir.save(build(text, weights), tmp_path / "m.onnx")
    before = sorted(tmp_path.iterdir())
    arguments = [str(tmp_path / "m.onnx"), "-o", str(tmp_path / "out.onnx"), "--workers", "1"]
    # Under nohup, or in the background of a script, this signal is ignored, and would stay so.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "qcompiler.cli", *arguments], stderr=subprocess.PIPE, text=True
        )
    finally:
        signal.signal(signal.SIGINT, inherited)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) == len(before) and time.monotonic() < deadline:
        time.sleep(0.01)  # until it has made its working folder
    os.kill(process.pid, which)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted: no model was written" in err
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk_is_one_clear_error(tmp_path: Path, digits: Path) -> None:
    """A file size limit stands in for a full disk: writes fail half-way with an OS error."""
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "from qcompiler.cli.main import main\n"
        f"main([{str(digits)!r}, '-o', {str(tmp_path / 'out.onnx')!r}])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "no room left" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_one_clear_error(run: Run, digits: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    status, _, err = run(digits, "-o", tmp_path / "out.onnx")
    tmp_path.chmod(0o700)
    assert status == 2
    assert "cannot write there" in err
