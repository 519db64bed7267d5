"""Builds engines with TensorRT-RTX for tests: one JSON request a line, one answer a line.

It runs in a process of its own, since some graphs make the builder end in a segmentation fault.
"""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

rtx: Any = importlib.import_module("tensorrt_rtx")

_WARNING = 2


class _Logger(rtx.ILogger):  # type: ignore[misc]
    def __init__(self) -> None:
        rtx.ILogger.__init__(self)
        self.texts: list[str] = []

    def log(self, severity: Any, text: str) -> None:
        if int(severity) <= _WARNING:
            self.texts.append(text)


def _build(request: dict[str, Any]) -> dict[str, Any]:
    logger = _Logger()
    builder = rtx.Builder(logger)
    flag = 1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flag)
    parser = rtx.OnnxParser(network, logger)
    if not parser.parse_from_file(request["model"]):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        return {"stage": "parse", "log": [f"{e.node_name()}: {e.desc()}" for e in errors]}
    config = builder.create_builder_config()
    config.num_compute_capabilities = len(request["processors"])
    for index, name in enumerate(request["processors"]):
        config.set_compute_capability(getattr(rtx.ComputeCapability, name), index)
    if request["shapes"]:
        profile = builder.create_optimization_profile()
        for name, shapes in request["shapes"].items():
            profile.set_shape(name, *shapes)
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        return {"stage": "build", "log": logger.texts}
    Path(request["engine"]).write_bytes(memoryview(plan))
    return {"stage": "done", "log": logger.texts}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the library prints as well
    for line in sys.stdin:
        answers.write(json.dumps(_build(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
