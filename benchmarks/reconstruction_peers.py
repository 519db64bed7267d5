"""Public quantizers of weights on SmolLM2, to read beside `benchmarks.reconstruction`.

    python -m benchmarks.reconstruction_peers --peers autoround --schemes w2a16:b64 --device cuda

A peer runs where this does, and must be installed: `auto-round`, `gptqmodel`, `onnxruntime`,
`onnxsim`. It quantizes the model of transformers, onnxsim that of ONNX (codes with zero points,
onnxsim's without, in blocks of input channels, the tied embedding and output layer in float) on the
windows that our own arms learn from. What its codes stand for is put into the ONNX model in place
of the float weights and scored as our arms are. Seconds are those of quantizing alone. Results go
to benchmarks/results/reconstruction_peers.json and .md.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from benchmarks.arguments import add_names, add_scoring, benchmark_parser, command_line
from benchmarks.int8_workloads import INT8_WORKLOADS
from benchmarks.markdown_table import MISSING, made_with, measured_with, table
from benchmarks.models import smollm2, smollm2_checkpoint
from benchmarks.results_file import Results
from benchmarks.runtime import output_sqnr

MODEL: Final = "smollm2_folded"
SCHEMES: Final = ("w4a16:b32", "w4a16:b128", "w3a16:b128", "w2a16:b64")

Weights = dict[str, npt.NDArray[np.float32]]
"""By the name of the module's parameter, `[out, in]`."""
Windows = Sequence[npt.NDArray[np.int64]]


def autoround(
    windows: Windows, bits: int, block: int, arguments: argparse.Namespace
) -> tuple[Weights, float]:
    """Return weights by Intel AutoRound (Cheng et al. 2023, arXiv 2309.05516), and seconds."""
    import torch
    from auto_round import AutoRound  # type: ignore[import-not-found]
    from auto_round.schemes import QuantizationScheme  # type: ignore[import-not-found]

    module = smollm2.module("folded")
    scheme = QuantizationScheme(bits=bits, group_size=block, sym=False, data_type="int")
    calls = [{"input_ids": torch.from_numpy(window[None])} for window in windows]
    begin = perf_counter()
    peer = AutoRound(
        module,
        _tokenizer(),  # asked for, and not used: windows hold tokens
        scheme=scheme,
        dataset=calls,
        iters=arguments.iters,
        seqlen=len(windows[0]),
        nsamples=len(windows),
        batch_size=min(8, len(windows)),
        device_map=arguments.device,
        enable_torch_compile=False,
        amp=arguments.device != "cpu",
    )
    quantized, _ = peer.quantize()
    seconds = perf_counter() - begin
    return _linears(quantized), seconds


def gptqmodel(
    windows: Windows, bits: int, block: int, arguments: argparse.Namespace
) -> tuple[Weights, float]:
    """Return weights by GPTQModel's GPTQ, and seconds.

    With two cores or fewer, 7.7.0 loads nothing unless GPTQMODEL_CPU_WORKERS=2 is set.
    """
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig  # type: ignore[import-not-found]

    module = smollm2.module("folded")
    with tempfile.TemporaryDirectory() as folder:
        module.save_pretrained(folder)
        _tokenizer().save_pretrained(folder)
        config = QuantizeConfig(
            bits=bits,
            group_size=block,
            sym=False,
            format="gptq_v2",  # in the older form a zero point of 0 is lost
            device=arguments.device,
            offload_to_disk=False,
        )
        # Else a float32 model is cast to bfloat16.
        peer = GPTQModel.load(folder, config, dtype=torch.float32)
        calls = [{"input_ids": w.tolist(), "attention_mask": [1] * len(w)} for w in windows]
        begin = perf_counter()
        peer.quantize(calls, batch_size=1)
        seconds = perf_counter() - begin
        found: Weights = {}
        for name, layer in peer.model.named_modules():
            if hasattr(layer, "dequantize_weight"):
                with torch.no_grad():
                    values = layer.dequantize_weight()
                found[f"{name}.weight"] = values.T.float().cpu().numpy()
        return found, seconds


def onnxruntime(
    windows: Windows, bits: int, block: int, _arguments: argparse.Namespace
) -> tuple[Weights, float]:
    """Return weights by the GPTQ that ONNX Runtime bundles, and seconds.

    It runs the whole model anew for every weight, and offers 4 bits alone. Here its rounding is
    given the Hessians that it would come to from one run. Of 4 bits it takes new scales for what
    was rounded, and so does this.
    """
    from onnxruntime.quantization.neural_compressor.weight_only import gptq, qdq_tensor

    begin = perf_counter()
    module = smollm2.module("folded")
    hessians = _second_moments(module, windows)
    found = {}
    for name, weight in _linears(module).items():
        hessian = 2 / len(windows) * hessians[name]
        rounded = gptq(weight.T.copy(), hessian, bits, block, "asym").T
        if bits == 4:
            padded = np.pad(rounded, ((0, 0), (0, -rounded.shape[1] % block)))
            rounded = qdq_tensor(padded, bits, block, "asym", "uint")[:, : rounded.shape[1]]
        found[name] = rounded.astype(np.float32)
    return found, perf_counter() - begin


def _second_moments(module: Any, windows: Windows) -> dict[str, npt.NDArray[np.float64]]:
    """Return `X^T X` of what every linear of a module multiplies, by name of its weight."""
    import torch

    sums: dict[str, Any] = {}

    def add(name: str, _linear: Any, inputs: Sequence[Any]) -> None:
        rows = inputs[0].flatten(0, -2)
        sums[name] = sums.get(name, 0) + (rows.mT @ rows).double()

    handles = [
        linear.register_forward_pre_hook(partial(add, name))
        for name, linear in module.named_modules()
        if isinstance(linear, torch.nn.Linear) and name != "lm_head"
    ]
    with torch.no_grad():
        for window in windows:
            module(torch.from_numpy(window[None]))
    for handle in handles:
        handle.remove()
    return {f"{name}.weight": total.numpy() for name, total in sums.items()}


def onnxsim(
    windows: Windows, _bits: int, block: int, _arguments: argparse.Namespace
) -> tuple[Weights, float]:
    """Return weights by onnxsim's GPTQ, and seconds."""
    import onnxsim as peer  # type: ignore[import-not-found]

    model = onnx.load(INT8_WORKLOADS[MODEL].task.build())
    # It leaves models below opset 21 as they are; these ops only took more types there.
    model.opset_import[0].version = 21
    calls = [
        {"input_ids": each[None], "attention_mask": np.ones_like(each[None])} for each in windows
    ]
    begin = perf_counter()
    quantized = peer.apply_gptq(model, peer.quantize_weight_only_int4(model), calls)
    seconds = perf_counter() - begin
    before, after = (
        {node.output[0]: node.input[1] for node in each.graph.node if node.op_type == "MatMul"}
        for each in (model, quantized)
    )
    floats = {tensor.name: tensor for tensor in model.graph.initializer}
    codes = {tensor.name: tensor for tensor in quantized.graph.initializer}
    made = {node.output[0]: node for node in quantized.graph.node}
    names = _parameters()
    found = {}
    for output, weight in before.items():
        name = (
            names.get(numpy_helper.to_array(floats[weight]).tobytes()) if weight in floats else None
        )
        if name is not None:
            code, scale = (numpy_helper.to_array(codes[each]) for each in made[after[output]].input)
            values = code.astype(np.float32) * np.repeat(scale, block, axis=0)
            found[name] = np.ascontiguousarray(values.T)
    return found, seconds


PEERS: Final[Mapping[str, Callable[..., tuple[Weights, float]]]] = {
    "autoround": autoround,
    "gptqmodel": gptqmodel,
    "onnxruntime": onnxruntime,
    "onnxsim": onnxsim,
}
OFFERED: Final = {"onnxsim": ("w4a16:b32",)}
"""What peers can do that cannot do all."""
PACKAGES: Final = {
    "autoround": "auto-round",
    "gptqmodel": "gptqmodel",
    "onnxruntime": "onnxruntime",
    "onnxsim": "onnxsim",
}


def _tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    found = smollm2_checkpoint.load_tokenizer(smollm2.checkpoint_path(None))
    return PreTrainedTokenizerFast(tokenizer_object=found)


def _linears(module: Any) -> Weights:
    import torch

    return {
        f"{name}.weight": layer.weight.detach().float().cpu().numpy()
        for name, layer in module.named_modules()
        if isinstance(layer, torch.nn.Linear) and name != "lm_head"
    }


def _parameters() -> dict[bytes, str]:
    """Return the name of every linear's weight by its bytes as the ONNX model has it."""
    return {array.T.tobytes(): name for name, array in _linears(smollm2.module("folded")).items()}


def carry_back(source: Path, weights: Weights, output: Path) -> int:
    """Write the ONNX model with the weights of the module's linears; return how many it took.

    Raises:
        ValueError: A linear's float weight is in no initializer, or has none of the new ones.
    """
    truths = _parameters()
    model = onnx.load(source)
    taken = set()
    for tensor in model.graph.initializer:
        if len(tensor.dims) == 2 and (name := truths.get(numpy_helper.to_array(tensor).tobytes())):
            new = np.ascontiguousarray(weights[name].T)
            tensor.CopyFrom(numpy_helper.from_array(new, tensor.name))
            taken.add(name)
    if taken != set(truths.values()) or taken != set(weights):
        message = f"{len(taken)} of {len(truths)} linears were found, of {len(weights)} new weights"
        raise ValueError(message)
    onnx.save_model(model, output, save_as_external_data=True, location=f"{output.name}.data")
    return len(taken)


def measure(
    peer: str, scheme: str, windows: Windows, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Run a peer and score what it made."""
    workload = INT8_WORKLOADS[MODEL]
    head, _, block = scheme.partition(":b")
    source = workload.task.build()
    weights, seconds = PEERS[peer](windows, int(head[1]), int(block), arguments)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "peer.onnx"
        carry_back(source, weights, output)
        limit = workload.task.quick if arguments.quick else workload.task.full
        score = workload.task.evaluate(output, limit)
        sqnr = output_sqnr(source, output, workload.feeds())
    return {
        "score": score[workload.task.metric],
        "sqnr_db": sqnr,
        "seconds": seconds,
        "device": arguments.device,
        "calls": len(windows),
        "made_with": {name: version(name) for name in (PACKAGES[peer], "torch", "transformers")},
    }


def markdown(content: Mapping[str, Any]) -> str:
    """Return the table: peers down and schemes across."""
    parts = measured_with(content)
    arms = content["models"][MODEL]["arms"]

    def cell(peer: str, scheme: str) -> str:
        facts = arms.get(f"{scheme} {peer}")
        return f"{facts['score']:.2f}, {facts['seconds'] / 60:.1f} min" if facts else MISSING

    parts += ["", f"### {MODEL}: perplexity, minutes", ""]
    parts += table({peer: {scheme: cell(peer, scheme) for scheme in SCHEMES} for peer in PEERS})
    parts += ["", *made_with(content)]
    parts += [
        f"- `{arm}`: on {facts['processor']}, device {facts['device']}"
        for arm, facts in arms.items()
        if "processor" in facts
    ]
    return "\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = benchmark_parser(__doc__)
    add_names(parser, "--peers", list(PEERS))
    add_names(parser, "--schemes", list(SCHEMES))
    parser.add_argument("--calls", type=int, default=32, help="Windows of 512 tokens.")
    parser.add_argument("--iters", type=int, default=200, help="Of AutoRound; its default.")
    parser.add_argument("--device", default="cpu", help="Where PyTorch computes.")
    add_scoring(parser)
    chosen = parser.parse_args(arguments)
    results = Results(command_line(), chosen.folder, "reconstruction_peers")
    feeds = smollm2.sample_feeds(chosen.calls, length=smollm2.CONTEXT)
    windows = [each["input_ids"][0] for each in feeds]
    for peer in chosen.peers:
        for scheme in chosen.schemes:
            arm = f"{scheme} {peer}"
            possible = scheme in OFFERED.get(peer, SCHEMES)
            if not possible or (chosen.resume and results.arm(MODEL, arm)):
                continue
            facts = measure(peer, scheme, windows, chosen)
            results.put(MODEL, arm, facts)
            print(f"{MODEL} {arm}: {json.dumps(facts)}", flush=True)
    results.markdown.write_text(markdown(results.content), encoding="utf-8")


if __name__ == "__main__":
    main()
