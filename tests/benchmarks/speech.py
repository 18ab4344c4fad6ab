"""Labelled speech that packages carry or make: twelve spoken keywords, and Japanese vowels by nine speakers.

Needs, without what they depend on:
    pip install --no-deps espeakng-loader==0.2.4 aeon==1.6.0

The keywords are spoken by a synthesiser (eSpeak NG 1.52, GPL-3, called in a process of its own): real audio features of
artificial voices. The voices of the test set speak nothing in the training set. The vowels are recordings of people
(Kudo, Toyama and Shimbo 1999, in the UEA archive): 12 cepstral coefficients, up to 29 frames, padded with zeros.
"""

import ctypes
import importlib.util
import itertools
import json
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

KEYWORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go", "silence", "unknown")
OTHER_WORDS = ("table", "seven", "marvin", "bird", "house", "three", "happy", "cat", "zero", "wow", "nine", "tree")
SPEAKERS = {
    "train": ("", "+m1", "+m3", "+m5", "+m7", "+f1", "+f3", "+klatt", "+whisper"),
    "test": ("+m2", "+m4", "+f2", "+f4", "+klatt3"),
}
ACCENTS = ("gmw/en", "gmw/en-US", "gmw/en-GB-x-rp", "gmw/en-029")
RATE_HZ = 16000
FRAME, HOP, BANDS, COEFFICIENTS, FRAMES = 640, 320, 40, 10, 49
VOWEL_FRAMES, VOWEL_COEFFICIENTS = 29, 12


@dataclass(frozen=True, slots=True)
class Labelled:
    """Arrays with the sample as first axis: float32 inputs, int64 classes."""

    inputs: np.ndarray
    labels: np.ndarray


# ---------------------------------------------------------------- keywords


def keywords(part, *, repeats, seed):
    """Return cepstra of one second of audio each, shape (samples, 1, 49, 10), and which keyword it is.

    Args:
        part: "train" or "test": whose voices.
        repeats: how often each utterance occurs, each time louder or quieter, earlier or later, in other noise.
    """
    rng = np.random.default_rng(seed)
    spoken = _utterances(part)
    features, labels = [], []
    for _ in range(repeats):
        for label, sound in spoken:
            features.append(cepstra(_second(sound, rng)))
            labels.append(label)
        for _ in range(len(spoken) // len(KEYWORDS)):
            features.append(cepstra(_second(np.zeros(1, np.float32), rng)))
            labels.append(KEYWORDS.index("silence"))
    order = rng.permutation(len(labels))
    return Labelled(np.stack(features)[order, None].astype(np.float32), np.array(labels)[order])


def cepstra(sound):
    """Return 10 mel-frequency cepstral coefficients of 49 frames of 40 ms, every 20 ms, scaled to a few units.

    Source: Davis and Mermelstein 1980; sizes of Zhang et al. 2017 ("Hello Edge"), figure 1.
    """
    from scipy.fft import dct

    starts = np.arange(FRAMES) * HOP
    frames = sound[starts[:, None] + np.arange(FRAME)] * np.hanning(FRAME)
    power = np.abs(np.fft.rfft(frames, 1024)) ** 2
    return dct(np.log(power @ _mel_filters().T + 1e-6), norm="ortho")[:, :COEFFICIENTS] / 10


@cache
def _mel_filters():
    """Return triangles over the spectrum, equally wide in mel, shape (40, 513)."""
    highest = 2595 * np.log10(1 + 4000 / 700)
    corners = 700 * (10 ** (np.linspace(2595 * np.log10(1 + 20 / 700), highest, BANDS + 2) / 2595) - 1)
    frequencies = np.fft.rfftfreq(1024, 1 / RATE_HZ)
    rising = (frequencies - corners[:-2, None]) / (corners[1:-1] - corners[:-2])[:, None]
    falling = (corners[2:, None] - frequencies) / (corners[2:] - corners[1:-1])[:, None]
    return np.maximum(0, np.minimum(rising, falling))


def _second(sound, rng):
    """Place a word somewhere in one second of noise."""
    track = rng.standard_normal(RATE_HZ + FRAME).astype(np.float32) * 10 ** rng.uniform(-4, -2)
    sound = sound[: RATE_HZ - 1]
    start = rng.integers(0, RATE_HZ - len(sound))
    track[start : start + len(sound)] += sound * rng.uniform(0.3, 1.0)
    return track


def _utterances(part):
    """Return (label, sound at 16 kHz) of every keyword by every voice of a part, and three other words by each."""
    voices = [accent + speaker for accent in ACCENTS for speaker in SPEAKERS[part]]
    speeds = (150, 190) if part == "train" else (170,)
    spoken = [word for word in KEYWORDS if word not in ("silence", "unknown")]
    job, labels = [], []
    for number, (voice, speed) in enumerate(itertools.product(voices, speeds)):
        others = [OTHER_WORDS[(3 * number + index) % len(OTHER_WORDS)] for index in range(3)]
        job.append({"voice": voice, "speed": speed, "words": [*spoken, *others]})
        labels += [*(KEYWORDS.index(word) for word in spoken), *[KEYWORDS.index("unknown")] * 3]
    done = subprocess.run([sys.executable, __file__], input=json.dumps(job).encode(), capture_output=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"eSpeak NG failed (exit status {done.returncode}): {done.stderr.decode()[-400:]}")
    lengths = json.loads(done.stderr)
    ends = np.cumsum(lengths)
    samples = np.frombuffer(done.stdout, np.int16).astype(np.float32) / 32768
    return [(label, samples[end - length : end]) for label, length, end in zip(labels, lengths, ends, strict=True)]


def _speak(job):
    """Write every word's samples (int16, 16 kHz) to stdout, and how many each has to stderr as JSON."""
    import espeakng_loader

    engine = ctypes.CDLL(espeakng_loader.get_library_path())
    heard = []
    kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

    def hear(samples, count, _events):
        if samples and count:
            heard.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    callback = kind(hear)
    # 2: AUDIO_OUTPUT_SYNCHRONOUS. What comes back is the rate of its sounds, or an error below 0.
    rate_hz = engine.espeak_Initialize(2, 0, str(Path(espeakng_loader.get_data_path())).encode(), 0)
    if rate_hz <= 0:
        raise RuntimeError("eSpeak NG does not find its data; pip install --no-deps espeakng-loader==0.2.4")
    engine.espeak_SetSynthCallback(callback)
    lengths = []
    for turn in job:
        if engine.espeak_SetVoiceByName(turn["voice"].encode()) != 0:
            raise RuntimeError(f"eSpeak NG has no voice {turn['voice']!r}")
        engine.espeak_SetParameter(1, turn["speed"], 0)  # 1: espeakRATE, words per minute
        for word in turn["words"]:
            heard.clear()
            text = word.encode() + b"\0"
            # Position 0 in characters (1), no end, espeakCHARS_UTF8 (1), and nothing that is handed to the callback.
            engine.espeak_Synth(text, len(text), 0, 1, 0, 1, None, None)
            sound = _at_16_khz(np.concatenate(heard), rate_hz)
            sys.stdout.buffer.write(sound.tobytes())
            lengths.append(len(sound))
    sys.stderr.write(json.dumps(lengths))


def _at_16_khz(sound, rate_hz):
    from scipy.signal import resample_poly

    common = np.gcd(RATE_HZ, rate_hz)
    changed = resample_poly(sound.astype(np.float64), RATE_HZ // common, rate_hz // common)
    return np.clip(np.round(changed), -32768, 32767).astype(np.int16)


# ---------------------------------------------------------------- vowels


def vowels(part):
    """Return cepstra of vowels, shape (samples, 29, 12), and which of nine men spoke.

    Args:
        part: "train" (270 samples) or "test" (370).
    """
    found = importlib.util.find_spec("aeon")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("the vowels are in aeon; pip install --no-deps aeon==1.6.0")
    folder = Path(found.submodule_search_locations[0]) / "datasets" / "data" / "JapaneseVowels"
    lines = (folder / f"JapaneseVowels_{part.upper()}.ts").read_text(encoding="utf-8").splitlines()
    rows = lines[next(number for number, line in enumerate(lines) if line.lower().startswith("@data")) + 1 :]
    inputs = np.zeros((len(rows), VOWEL_FRAMES, VOWEL_COEFFICIENTS), np.float32)
    labels = np.zeros(len(rows), np.int64)
    for number, row in enumerate(rows):
        *channels, label = row.split(":")
        for channel, values in enumerate(channels):
            series = np.array(values.split(","), np.float32)
            inputs[number, : len(series), channel] = series
        labels[number] = int(label) - 1
    return Labelled(inputs, labels)


if __name__ == "__main__":
    _speak(json.load(sys.stdin))
