"""`qcompile doctor`: what this installation can do."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click

_CORE = (
    "qcompiler",
    "click",
    "ml-dtypes",
    "numpy",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxscript",
    "rich",
)
_EXTRAS = {
    "torch": ("qcompile export; graphs as PyTorch programs", "pip install 'qcompiler[torch]'"),
    "transformers": ("exporting Hugging Face models", "pip install 'qcompiler[transformers]'"),
    "gguf": ("exporting .gguf checkpoints", "pip install 'qcompiler[gguf]'"),
    "tokenizers": ("calibration from texts", "pip install 'qcompiler[text]'"),
    "pillow": ("calibration from images", "pip install 'qcompiler[images]'"),
    "onnx-graphsurgeon": ("user passes on GraphSurgeon graphs", "pip install 'qcompiler[surgeon]'"),
    "tensorrt": ("building TensorRT engines", "pip install 'qcompiler[tensorrt]'"),
    "tensorrt-rtx-cu13": (
        "building TensorRT-RTX engines, no GPU needed",
        "pip install 'qcompiler[tensorrt-rtx]'",
    ),
    "onnxruntime-gpu": ("running models on an NVIDIA GPU", "pip install onnxruntime-gpu"),
}


@click.command("doctor")
def command() -> None:
    """Show versions, execution providers and processor features, and what is missing."""
    has_gpu_build = _version("onnxruntime-gpu") is not None
    for name in _CORE:
        if name == "onnxruntime" and has_gpu_build:
            continue  # the GPU build takes its place
        click.echo(f"{name:20} {_version(name) or 'MISSING: pip install ' + name}")
    for name, (purpose, install) in _EXTRAS.items():
        click.echo(f"{name:20} {_version(name) or f'not installed ({purpose}): {install}'}")
    click.echo(f"{'python':20} {platform.python_version()} on {platform.platform()}")
    click.echo(f"{'providers':20} {', '.join(_providers())}")
    for line in _processor():
        click.echo(f"{'processor':20} {line}")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _providers() -> list[str]:
    try:
        import onnxruntime
    except ImportError as error:
        return [f"none: onnxruntime does not import ({error})"]
    names: list[str] = onnxruntime.get_available_providers()
    return names


def _processor() -> list[str]:
    """Say which integer instructions the processor has, where the system tells."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return [platform.processor() or "unknown"]
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
    found = [
        flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8") if flag in flags
    ]
    lines = [", ".join(found) or "no AVX2"]
    if not {"avx512_vnni", "avx_vnni", "amx_int8"} & set(flags):
        lines.append(
            "without VNNI: 8-bit weights times 8-bit activations can saturate 16-bit sums in "
            "ONNX Runtime; weight-only schemes are not affected"
        )
    return lines
