"""A library that is built with in place of TensorRT-RTX, and does what a test says."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Does = Callable[..., None]

FAKE = '''
"""Does what the test's plan says, through the part of the API that is used."""
import enum, json, os, pathlib, sys, time

PLAN = json.loads(pathlib.Path(__file__).with_name("plan.json").read_text())
__version__ = "9.9"

class BuilderFlag(enum.IntEnum):
    REFIT = 0
class MemoryPoolType(enum.IntEnum):
    WORKSPACE = 0
class ComputeCapability(enum.IntEnum):
    SM86 = 0
class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1
class HardwareCompatibilityLevel(enum.IntEnum):
    NONE = 0
class ILogger: pass
class IProgressMonitor: pass

def refused(path, nodes):
    """Say whether one of the nodes reads what a DequantizeLinear makes."""
    import onnx
    graph = onnx.load(path, load_external_data=False).graph
    decoded = {name for n in graph.node if n.op_type == "DequantizeLinear" for name in n.output}
    return any(n.name in nodes and decoded & set(n.input) for n in graph.node)

class Config:
    def __init__(self): self.calls, self.__dict__["cache"] = [], None
    def set_flag(self, flag): self.calls.append(["flag", flag.name])
    def set_memory_pool_limit(self, pool, size): self.calls.append(["pool", pool.name, size])
    def set_compute_capability(self, capability, index): self.calls.append(["sm", capability.name])
    def create_timing_cache(self, data): return data
    def set_timing_cache(self, data, ignore_mismatch): self.cache = data
    def get_timing_cache(self): return Cache(self.cache + b"+")
    def add_optimization_profile(self, profile): self.calls.append(["profile", profile.shapes])

class Cache:
    def __init__(self, data): self.data = data
    def serialize(self): return self.data

class Profile:
    def __init__(self): self.shapes = {}
    def set_shape(self, name, *shapes): self.shapes[name] = shapes
    def set_shape_input(self, name, *values): self.shapes[name + " values"] = values

class Input:
    name, shape, is_shape_tensor = "x", (-1, 8), False

class Rounds:
    name, shape, is_shape_tensor = "n", (), True

class Network:
    model = None
    num_layers = 3
    num_inputs = property(lambda self: 2 if PLAN.get("rounds") else 1)
    def get_input(self, index): return (Input, Rounds)[index]

class Error:
    def __init__(self, node): self.node = node
    def node_name(self): return self.node
    def node_operator(self): return "Relu"
    def desc(self): return "not today"

class OnnxParser:
    def __init__(self, network, logger):
        self.network = network
        self.errors = [Error(n) for n in PLAN.get("parse", [])]
    num_errors = property(lambda self: len(self.errors))
    def get_error(self, index): return self.errors[index]
    def parse_from_file(self, path):
        self.network.model = path
        return not self.errors

class Engine(bytes):
    nbytes = property(len)

class Builder:
    def __init__(self, logger): self.logger = logger
    def create_network(self, flags): assert flags == 2; return Network()
    def create_builder_config(self): return Config()
    def create_optimization_profile(self): return Profile()
    def build_serialized_network(self, network, config):
        print("chatter of the library")
        monitor = config.progress_monitor
        monitor.phase_start("Building", None, 4)
        monitor.phase_start("inner", "Building", 9)
        monitor.step_complete("inner", 0)
        monitor.step_complete("Building", 0)
        for severity, text in PLAN.get("log", []):
            self.logger.log(severity, text)
        if PLAN.get("hog"):
            held = [bytearray(b"1") * (1 << 22) for _ in range(200) if time.sleep(0.01) is None]
        if PLAN.get("abort"):
            os.abort()
        monitor.phase_finish("Building")
        if PLAN.get("nothing"):
            return None
        if "refuses" in PLAN and refused(network.model, PLAN["refuses"]):
            return None
        if PLAN.get("copies"):
            return Engine(pathlib.Path(network.model + ".data").read_bytes())
        return Engine(json.dumps(config.calls).encode())
'''


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Does:
    """Return a function that says what the library of the test does."""
    folder = tmp_path / "library"
    folder.mkdir()
    (folder / "tensorrt_rtx.py").write_text(FAKE, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.syspath_prepend(folder)

    def plan(**does: Any) -> None:
        (folder / "plan.json").write_text(json.dumps(does), encoding="utf-8")

    plan()
    return plan
