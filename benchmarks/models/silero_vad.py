"""Silero VAD, a streaming speech detector (convolutions and an LSTM), as it ships in ONNX.

At 16 kHz a step takes 64 samples of context and 512 new ones, and a state that the next step gets.
The variants differ in how they say that:

| variant | opset | inputs | notes |
|---|---|---|---|
| `op18_ifless` | 18 | input, sr, state | LSTM spelled out in Gemms; one `If` for the rates |
| `vad` | 16 | input, state, sr | 8 and 16 kHz, 25 nested `If` |
| `16k_op15` | 15 | input, state, sr | 12 `If` |
| `half` | 16 | input, state | 16-bit weights, 12 `If` |
| `openvino_16k` | 16 | input, state | static shapes, no `If` |
| `16k_sequence` | 16 | input, h, c | any number of steps in one run |

The package ships no recording, so what is scored is agreement with the float model on a synthetic
signal (`speech_like_audio`), not accuracy on speech.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import onnxruntime as ort

from benchmarks.assets import package_file
from benchmarks.packages import SILERO_VAD
from benchmarks.runtime import Array, Feeds, ModelSource, open_session, run
from qcompiler.quant.ranges import sqnr_db

Variant = Literal["op18_ifless", "vad", "16k_op15", "half", "openvino_16k", "16k_sequence"]

VARIANTS: tuple[Variant, ...] = get_args(Variant)
SAMPLE_RATE = 16_000
CHUNK = 512
CONTEXT = 64
STEPS = 600
_HIDDEN = 128
_SPEECH = 0.5
# Output that carries the state -> input of the next step.
_STATES = {"stateN": "state", "hn": "h", "cn": "c"}
# First and second formant of five vowels, in Hz.
_VOWELS = np.array([[730, 1090], [270, 2290], [300, 870], [530, 1840], [570, 840]], np.float64)


def build(variant: Variant = "op18_ifless", cache_dir: Path | None = None) -> Path:
    """Return the file of a variant, as shipped."""
    name = "silero_vad.onnx" if variant == "vad" else f"silero_vad_{variant}.onnx"
    return package_file(SILERO_VAD, name, cache_dir)


def evaluate(
    source: ModelSource,
    limit: int = STEPS,
    cache_dir: Path | None = None,
    reference: ModelSource | None = None,
) -> dict[str, float]:
    """Compare a model with the float one over `limit` steps of 32 ms, each carrying its own state.

    Args:
        source: The model to score.
        limit: Number of steps.
        cache_dir: Cache folder, when not the user's own.
        reference: The float model; `op18_ifless` as shipped when None.

    Returns:
        `mean_abs` and `max_abs` difference of the speech probabilities, their `sqnr_db`,
        `agreement` (percent of steps on the same side of 0.5), `speech` (percent of steps in which
        the float model hears speech), and `steps`.
    """
    float_model = reference or build(cache_dir=cache_dir)
    expected = speech_probabilities(float_model, limit)
    actual = speech_probabilities(source, limit)
    difference = np.abs(actual - expected)
    same_side = ((actual > _SPEECH) == (expected > _SPEECH)) & np.isfinite(actual)
    return {
        "mean_abs": float(difference.mean()),
        "max_abs": float(difference.max()),
        "sqnr_db": sqnr_db(float(np.square(expected).sum()), float(np.square(difference).sum())),
        "agreement": 100.0 * float(same_side.mean()),
        "speech": 100.0 * float((expected > _SPEECH).mean()),
        "steps": float(limit),
    }


def speech_probabilities(source: ModelSource, steps: int) -> Array:
    """Return the probability of speech in each step of the synthetic signal, float64 [steps]."""
    session = open_session(source)
    return np.array([probability for _, probability in _stream(session, steps)], np.float64)


def sample_feeds(
    n: int, variant: Variant = "op18_ifless", cache_dir: Path | None = None, seed: int = 0
) -> list[Feeds]:
    """Return `n` steps of the signal with the states that the float model reaches in them.

    `evaluate` hears the signal of seed 0.
    """
    session = open_session(build(variant, cache_dir))
    spacing = max(1, STEPS // n)
    feeds = [feed for feed, _ in _stream(session, n * spacing, seed)]
    return feeds[::spacing]


def speech_like_audio(samples: int, seed: int = 0) -> Array:
    """Return a signal that a speech detector takes for speech with pauses.

    Voiced syllables (harmonics of a gliding pitch under two formants) with hissing onsets, in
    phrases of about two seconds, over faint noise.

    Returns:
        float32 [samples] at 16 kHz, within -1 to 1.
    """
    rng = np.random.default_rng(seed)
    audio = 0.003 * rng.standard_normal(samples)
    position = SAMPLE_RATE // 2
    while position < samples:
        phrase_end = position + int(SAMPLE_RATE * rng.uniform(1.2, 2.5))
        while position < min(phrase_end, samples):
            syllable = _syllable(rng)[: samples - position]
            audio[position : position + len(syllable)] += syllable
            position += len(syllable)
        position += int(SAMPLE_RATE * rng.uniform(0.6, 1.6))
    return np.clip(audio, -1, 1).astype(np.float32)


def _syllable(rng: np.random.Generator) -> Array:
    hiss = np.diff(rng.standard_normal(int(SAMPLE_RATE * rng.uniform(0.03, 0.08))), prepend=0.0)
    length = int(SAMPLE_RATE * rng.uniform(0.12, 0.28))
    time = np.arange(length) / SAMPLE_RATE
    pitch = rng.uniform(100, 180) * (1 + rng.uniform(-0.15, 0.15) * time / time[-1])
    phase = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE
    first, second = _VOWELS[rng.integers(len(_VOWELS), size=2)]
    formants = first + (second - first) * (time / time[-1])[:, None]
    voice = np.zeros(length)
    for harmonic in range(1, 30):
        frequency = harmonic * pitch
        resonance = (1 / (1 + ((frequency[:, None] - formants) / 90) ** 2)).sum(axis=1)
        voice += (resonance + 0.02) / harmonic**0.5 * np.sin(harmonic * phase)
    voice *= np.abs(np.sin(np.pi * time / time[-1])) ** 0.5
    loudness = rng.uniform(0.15, 0.4)
    return np.concatenate([0.05 * loudness * hiss, loudness * voice / np.abs(voice).max()])


def _stream(
    session: ort.InferenceSession, steps: int, seed: int = 0
) -> Iterator[tuple[Feeds, float]]:
    """Yield what each step was fed, and the probability of speech it gave."""
    names = {value.name for value in session.get_inputs()}
    carried = {
        name: np.zeros((2 if name == "state" else 1, 1, _HIDDEN), np.float32)
        for name in names.intersection(_STATES.values())
    }
    rate = {"sr": np.array(SAMPLE_RATE, np.int64)} if "sr" in names else {}
    signal = speech_like_audio(steps * CHUNK, seed)
    audio = np.concatenate([np.zeros(CONTEXT, np.float32), signal])
    for step in range(steps):
        chunk = audio[step * CHUNK : (step + 1) * CHUNK + CONTEXT]
        feeds: Feeds = {"input": chunk[None], **carried, **rate}
        outputs = run(session, feeds)
        carried = {_STATES[name]: outputs[name] for name in _STATES.keys() & outputs.keys()}
        probability = outputs.get("output", outputs.get("speech_probs"))
        assert probability is not None
        yield feeds, float(probability.ravel()[0])
