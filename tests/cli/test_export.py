"""`qcompile export`."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch import nn

import qcompiler.export.checked_file
from qcompiler.cli.main import main
from qcompiler.errors import UsageError
from qcompiler.export.sources import SourceKind, kind_of
from qcompiler.ir.load import load_model
from tests.support.torch_modules import TiedLm

Run = Callable[..., tuple[int, str, str]]

HERE = "tests.cli.test_export"


def language_model() -> tuple[nn.Module, tuple[torch.Tensor, ...], object]:
    torch.manual_seed(0)
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence", max=64)
    ids = torch.randint(0, 512, (2, 7))
    return TiedLm(512, 64, 1), (ids,), ({0: batch, 1: sequence},)


def with_keywords() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return nn.Linear(64, 32), {"input": torch.randn(2, 64)}


class _Aliasing(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a + a if a is b else a - b


def aliased() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """A module whose code is another for two different tensors than for one given twice."""
    x = torch.randn(2, 3)
    return _Aliasing(), (x, x)


def no_inputs() -> nn.Module:
    return nn.Linear(2, 2)


def no_tuple() -> tuple[nn.Module, torch.Tensor]:
    return nn.Linear(2, 2), torch.ones(1, 2)


def failing() -> None:
    message = "no such checkpoint"
    raise RuntimeError(message)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Run the command in this process; gives exit status, standard output and error."""
    # The functions above are this module's own, under whatever name pytest imported it.
    monkeypatch.setitem(sys.modules, HERE, sys.modules[__name__])

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        text = capsys.readouterr()
        return int(stop.value.code or 0), text.out, text.err

    handler = signal.getsignal(signal.SIGTERM)
    yield call
    signal.signal(signal.SIGTERM, handler)


def test_a_function_is_exported_and_compiles(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "lm.onnx"
    names = ("--input-names", "tokens", "--output-names", "logits")
    status, out, _ = run("export", f"{HERE}:language_model", "-o", path, *names)
    assert status == 0
    lines = out.splitlines()
    assert lines[0] == "input   tokens  int64 [batch, sequence]"
    assert lines[1] == "output  logits  float32 [batch, sequence, 512]"
    assert lines[2] == "sites   8 weights to quantize: 1 Gather, 7 MatMul"
    assert lines[3].startswith("parity  logits: ")
    assert lines[4].startswith(f"{path}: ")
    assert [file.name for file in tmp_path.iterdir()] == ["lm.onnx"]
    assert load_model(path).graph.inputs[0].name == "tokens"

    status, out, _ = run(path, "--scheme", "w8a16", "-o", tmp_path / "int8.onnx")
    assert status == 0
    assert "8 of 8 weight ops quantized" in out


def test_a_program_is_exported(run: Run, tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor, *, gain: torch.Tensor) -> torch.Tensor:
            return x * gain

    program = torch.export.export(Scaled(), (torch.ones(3),), {"gain": torch.tensor([2.0])})
    torch.export.save(program, tmp_path / "scaled.pt2")
    status, out, _ = run("export", tmp_path / "scaled.pt2", "-o", tmp_path / "scaled.onnx")
    assert status == 0
    assert "input   gain  float32 [1]" in out
    assert "inf dB from PyTorch, at most 0" in out


def test_types_and_keywords(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "half.onnx"
    options = ("--dtype", "bfloat16", "--opset", 22)
    status, out, _ = run("export", f"{HERE}:with_keywords", "-o", path, *options)
    assert status == 0
    assert "input   input  bfloat16 [2, 64]" in out
    model = load_model(path)
    assert model.opset_imports[""] == 22
    assert model.graph.outputs[0].dtype == ir.DataType.BFLOAT16


def test_a_graph_that_differs_is_not_written(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "out.onnx"
    status, _, err = run("export", f"{HERE}:aliased", "-o", path)
    assert status == 5
    assert "differs from PyTorch" in err
    assert "no two example inputs are the same tensor" in err
    assert not list(tmp_path.iterdir())
    status, out, _ = run("export", f"{HERE}:aliased", "-o", path, "--no-parity")
    assert status == 0
    assert "not compared with PyTorch: --no-parity" in out
    assert path.exists()


def test_interrupted_runs_leave_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, file: Path, **__: object) -> None:
        assert file.exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(qcompiler.export.checked_file, "check_parity", interrupt)
    status, _, err = run("export", f"{HERE}:with_keywords", "-o", tmp_path / "out.onnx")
    assert status == 130
    assert "no model was written" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("source", "options", "reason"),
    [
        (f"{HERE}:no_inputs", (), "returned Linear, which is no module with inputs"),
        (f"{HERE}:no_tuple", (), "make them a tuple"),
        (f"{HERE}:failing", (), "RuntimeError: no such checkpoint"),
        (f"{HERE}:missing", (), "has no function missing"),
        (f"{HERE}:aliased", ("--task", "causal-lm"), "--task is for checkpoints"),
        (f"{HERE}:aliased", ("--no-cache",), "--no-cache is for checkpoints"),
        ("model.pt2", ("--dtype", "float16"), "has its types fixed"),
        ("model.pt2", (), "there is no such file"),
        ("weights.pt", (), "a pickle, or a TorchScript archive"),
        ("model.onnx", (), "an ONNX model already: compile it"),
        ("model.gguf", ("--task", "masked-lm"), "holds a causal-lm model"),
        ("model.gguf", ("--input-names", "a"), "named after its task"),
    ],
)
def test_refusals(
    run: Run, tmp_path: Path, source: str, options: tuple[str, ...], reason: str
) -> None:
    status, out, err = run("export", source, "-o", tmp_path / "out.onnx", *options)
    assert status == 2
    assert not out
    assert reason in err
    assert not list(tmp_path.iterdir())


def test_outputs_that_cannot_be_written_are_refused_first(run: Run, tmp_path: Path) -> None:
    for path, reason in ((tmp_path, "is a directory"), (tmp_path / "no" / "x.onnx", "no such")):
        status, _, err = run("export", f"{HERE}:failing", "-o", path)
        assert status == 2
        assert reason in err


def test_a_missing_package_is_one_sentence(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.onnx", None)
    for source in (f"{HERE}:aliased", "model.pt2"):
        status, _, err = run("export", source, "-o", tmp_path / "out.onnx")
        assert status == 2
        assert "needs torch" in err
        assert "pip install 'qcompiler[torch]'" in err


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from qcompiler.cli.main import main\n"
        "try: main(['export', '--help'])\n"
        "except SystemExit as stop: print(stop.code, 'onnx' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "SOURCE is a .pt2 file" in done.stdout
    assert done.stdout.splitlines()[-1] == "0 False"


def test_kinds_of_sources(tmp_path: Path) -> None:
    assert kind_of(str(tmp_path)) is SourceKind.CHECKPOINT
    assert kind_of("some/model") is SourceKind.CHECKPOINT
    assert kind_of("m.gguf") is SourceKind.GGUF
    assert kind_of("m.PT2") is SourceKind.PROGRAM
    assert kind_of("pkg.models:make") is SourceKind.FUNCTION
    with pytest.raises(UsageError, match="name the folder"):
        kind_of("model.safetensors")
