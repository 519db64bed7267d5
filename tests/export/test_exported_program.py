import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qcompiler.errors import ModelError, UsageError
from qcompiler.export.exported_program import (
    from_exported_program,
    is_arithmetic,
    load_exported_program,
)
from qcompiler.export.parity import check_parity
from qcompiler.ir.quantizable import find_sites
from tests.support.torch_modules import case


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = case("lm")
    shapes = ({0: torch.export.Dim("batch", max=8), 1: torch.export.Dim("sequence", max=64)},)
    program = torch.export.export(made.module.eval(), made.example, dynamic_shapes=shapes)
    path = tmp_path_factory.mktemp("programs") / "lm.pt2"
    torch.export.save(program, path)
    return path


def test_a_program_is_exported_as_its_module(saved: Path) -> None:
    model = from_exported_program(saved, input_names=["ids"], output_names=["logits"])
    made = case("lm")
    assert tuple(site.node.name for site in find_sites(model)[0]) == made.sites
    assert "embed_tokens.weight" in model.graph.initializers
    assert "lm_head.weight" not in model.graph.initializers
    check_parity(made.module, model, [made.example], tolerance=2e-6)


Rewrite = Callable[[str, bytes], dict[str, bytes]]


def rewritten(source: Path, target: Path, rewrite: Rewrite) -> Path:
    """Copy an archive part by part; `rewrite` gives the parts that take the place of one."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            for part, data in rewrite(name, old.read(name)).items():
                new.writestr(part, data)
    return target


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def _code(bomb: Path) -> bytes:
    """Return text that makes the folder when SymPy's parser or `exec` gets it."""
    return f"__import__('os').mkdir('{bomb}')".encode()


def _pickled_example(bomb: Path) -> Rewrite:
    pickled = pickle.dumps(Bomb(bomb), protocol=2)
    return lambda name, data: {name: pickled if name.endswith("inputs/model.pt") else data}


def _pickled_weight(bomb: Path) -> Rewrite:
    def rewrite(name: str, data: bytes) -> dict[str, bytes]:
        if name.endswith("weights_config.json"):
            config = json.loads(data)
            next(iter(config["config"].values()))["use_pickle"] = True
            data = json.dumps(config).encode()
        elif name.endswith("weights/weight_0"):
            data = pickle.dumps(Bomb(bomb))
        return {name: data}

    return rewrite


def _with_part(part: str) -> Callable[[Path], Rewrite]:
    def rewrite_for(bomb: Path) -> Rewrite:
        more = {f"lm/{part}": pickle.dumps(Bomb(bomb))}
        return lambda name, data: {name: data} | (more if name.endswith("_format") else {})

    return rewrite_for


def _with_text(old: bytes, new: Callable[[Path], bytes]) -> Callable[[Path], Rewrite]:
    def rewrite_for(bomb: Path) -> Rewrite:
        def rewrite(name: str, data: bytes) -> dict[str, bytes]:
            if not name.endswith("models/model.json"):
                return {name: data}
            changed = re.sub(old, lambda _: new(bomb), data)
            assert changed != data
            return {name: changed}

        return rewrite

    return rewrite_for


_EXPRESSION = _with_text(rb"Symbol\('s[^\"]*", _code)
_HOSTILE = {
    "example": (_pickled_example, "example inputs are more than tensors"),
    "weight": (_pickled_weight, "holds a pickle"),
    "opaque": (
        _with_part("data/constants/opaque_obj_0"),
        "holds data/constants/opaque_obj_0, which may run code",
    ),
    "library": (_with_part("data/aotinductor/model/x.so"), "holds data/aotinductor/model/x.so"),
    "legacy": (_with_part("data/weights/model.pt"), "holds data/weights/model.pt"),
    "expression": (_EXPRESSION, "more than arithmetic"),
    "operator": (
        _with_text(rb"torch\.ops\.aten\.gelu\.default", lambda _: b"torch.hub.load"),
        "calls torch.hub.load, which is no operator",
    ),
    "guard": (
        _with_text(
            rb'"guards_code": \[\]', lambda bomb: b'"guards_code": ["' + _code(bomb) + b'"]'
        ),
        "more than arithmetic",
    ),
}


@pytest.mark.parametrize("name", list(_HOSTILE))
def test_refuses_what_would_run_code(name: str, saved: Path, tmp_path: Path) -> None:
    bomb = tmp_path / "bomb"
    rewrite_for, reason = _HOSTILE[name]
    path = rewritten(saved, tmp_path / "lm.pt2", rewrite_for(bomb))
    with pytest.raises(ModelError, match=reason):
        load_exported_program(path)
    assert not bomb.exists()


def test_a_copied_archive_loads(saved: Path, tmp_path: Path) -> None:
    """What the hostile archives are made with keeps an archive good."""
    path = rewritten(saved, tmp_path / "lm.pt2", lambda name, data: {name: data})
    assert load_exported_program(path).range_constraints


def test_torch_alone_would_run_code(saved: Path, tmp_path: Path) -> None:
    """If this fails, torch has become safe by itself."""
    bomb = tmp_path / "bomb"
    path = rewritten(saved, tmp_path / "lm.pt2", _EXPRESSION(bomb))
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever it makes of None
        torch.export.load(path)
    assert bomb.exists()


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        load_exported_program(tmp_path / "none.pt2")
    text = tmp_path / "text.pt2"
    text.write_text("hello")
    with pytest.raises(ModelError, match=r"is no \.pt2 file"):
        load_exported_program(text)
    weights = tmp_path / "weights.pt2"
    torch.save({"a": torch.ones(2)}, weights)
    with pytest.raises(ModelError, match=r"is no archive of torch\.export\.save"):
        load_exported_program(weights)


def test_truncated_file(saved: Path, tmp_path: Path) -> None:
    data = saved.read_bytes()
    for share in (0.1, 0.5, 0.9):
        path = tmp_path / "cut.pt2"
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(ModelError):
            load_exported_program(path)


@pytest.mark.parametrize(
    "text",
    [
        "Mul(Integer(16), Symbol('s27', positive=True, integer=True))",
        "Max(1, s0*s1 + 3)",
        "L['args'][0].size()[0] >= 2",
        "Eq(Mod(s0, 8), 0)",
        "True",
    ],
)
def test_arithmetic(text: str) -> None:
    assert is_arithmetic(text)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "eval('1')",
        "s0.__class__",
        "().__class__.__bases__[0]",
        "Symbol('__import__(1)')",
        "[x for x in s0]",
        "lambda: 1",
        "Max(open('a'), 1)",
        "(Max if s0 else eval)(1)",
        "s0; s1",
        "x := 1",
        "f'{s0}'",
        "",
    ],
)
def test_more_than_arithmetic(text: str) -> None:
    assert not is_arithmetic(text)
