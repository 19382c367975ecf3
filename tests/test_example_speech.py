# SPDX-License-Identifier: Apache-2.0
"""examples/speech.py: frames, mel bands, windows and accuracies against their definitions."""

import tarfile
import wave
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distbelief.cli import command
from distbelief.errors import ConfigurationError
from distbelief.report.files import read_summary
from tests import problems

SHARED_TAR = Path(__file__).parents[2] / "shared" / "data" / "fsdd-recordings.tar"
RATE = 8000


@pytest.fixture(scope="module")
def speech() -> Iterator[ModuleType]:
    with problems.example("speech") as module:
        yield module


def write(path: Path, samples: Any) -> bytes:
    """Write samples in [-1, 1] as the recordings are: one channel of 16 bit integers at 8 kHz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(np.round(np.asarray(samples) * 32767).astype("<i2").tobytes())
    return path.read_bytes()


def tone(hertz: float, samples: int = RATE, loudness: float = 0.5) -> Any:
    return loudness * np.sin(2 * np.pi * hertz * np.arange(samples) / RATE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two digits of two speakers, recordings 3, 4, 5 and 12 of each, all of different length and pitch."""
    clone = tmp_path_factory.mktemp("clone")
    names = [f"{digit}_{who}_{index}.wav" for digit in (2, 7) for who in ("ada", "max") for index in (3, 4, 5, 12)]
    for number, name in enumerate(names):
        write(clone / "recordings" / name, tone(200 + 150 * number, samples=1600 + 120 * number))
    (clone / "README.md").write_text("not a recording")
    return clone


def test_the_example_is_under_80_lines() -> None:
    assert len((problems.EXAMPLES / "speech.py").read_text().splitlines()) < 80


@pytest.mark.parametrize(("samples", "frames"), [(8000, 98), (1240, 14), (1239, 13), (700, 13)])
def test_frames_are_25_ms_every_10_ms_and_short_recordings_are_extended_to_150_ms(
    speech: ModuleType, tmp_path: Path, samples: int, frames: int
) -> None:
    assert speech.log_mel(write(tmp_path / "tone.wav", tone(440, samples))).shape == (frames, 40)


@pytest.mark.parametrize("hertz", [150, 440, 1000, 2200, 3600])
def test_the_energy_of_a_pure_tone_peaks_in_the_band_nearest_in_mel(
    speech: ModuleType, tmp_path: Path, hertz: float
) -> None:
    def mel(frequency: float) -> float:
        return float(2595 * np.log10(1 + frequency / 700))

    centres = mel(4000) * np.arange(1, 41) / 41
    energies = speech.log_mel(write(tmp_path / "tone.wav", tone(hertz)))
    assert int(energies.mean(0).argmax()) == int(np.abs(centres - mel(hertz)).argmin())


def test_energies_are_the_textbook_sums_over_bands(speech: ModuleType, tmp_path: Path) -> None:
    samples = np.random.default_rng(0).uniform(-0.9, 0.9, 2000)
    energies = speech.log_mel(write(tmp_path / "noise.wav", samples))
    start = 5 * 80
    hamming = 0.54 - 0.46 * np.cos(2 * np.pi * np.arange(200) / 200)
    power = np.abs(np.fft.rfft(samples[start : start + 200] * hamming, 512)) ** 2
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 4000 / 700), 42) / 2595) - 1)
    expected = np.zeros(40)
    for band, (low, centre, high) in enumerate(zip(edges, edges[1:], edges[2:], strict=False)):
        for bin_number, frequency in enumerate(np.arange(257) * RATE / 512):
            if low < frequency <= centre:
                expected[band] += power[bin_number] * (frequency - low) / (centre - low)
            elif centre < frequency < high:
                expected[band] += power[bin_number] * (high - frequency) / (high - centre)
    np.testing.assert_allclose(energies[5], (np.log(expected) + 4.6) / 4, atol=2e-3)


def test_a_folder_and_a_tar_archive_give_the_same_examples(speech: ModuleType, folder: Path, tmp_path: Path) -> None:
    archive = tmp_path / "recordings.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for path in sorted(folder.rglob("*"), reverse=True):
            tar.add(path, path.relative_to(folder), recursive=False)
    for test in (False, True):
        one, other = speech.SpokenDigits(str(folder), test), speech.SpokenDigits(str(archive), test)
        assert all(torch.equal(a, b) for a, b in zip(one[:], other[:], strict=True))
        assert torch.equal(one.recording, other.recording)


@pytest.mark.parametrize(("test", "indices"), [(True, (3, 4)), (False, (5, 12))])
def test_an_example_is_eleven_frames_of_one_recording_with_its_ends_repeated(
    speech: ModuleType, folder: Path, test: bool, indices: tuple[int, ...]
) -> None:
    data = speech.SpokenDigits(str(folder), test)
    paths = [path for path in folder.rglob("*.wav") if int(path.stem.split("_")[2]) in indices]
    expected = []
    for path in sorted(paths, key=lambda path: path.stem):
        energies = speech.log_mel(path.read_bytes())
        last = len(energies) - 1
        for frame in range(len(energies)):
            window = [energies[min(max(near, 0), last)] for near in range(frame - 5, frame + 6)]
            expected.append((torch.cat(window), int(path.name[0])))
    assert len(data) == len(expected)
    for index, (inputs, digit) in enumerate(expected):
        assert torch.equal(data[index][0], inputs)
        assert data[index][1] == digit


def test_a_mini_batch_fetched_at_once_is_its_examples_stacked(speech: ModuleType, folder: Path) -> None:
    data = speech.SpokenDigits(str(folder), test=False)
    indices = [40, 3, 3, len(data) - 1]
    inputs, digits = data.__getitems__(indices)
    assert inputs.shape == (4, 440)
    assert torch.equal(inputs, torch.stack([data[index][0] for index in indices]))
    assert torch.equal(digits, torch.stack([data[index][1] for index in indices]))


class Scripted(nn.Module):
    """Answers the given scores, whatever it is asked."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(scores)

    def forward(self, inputs: Tensor) -> Tensor:
        assert len(inputs) == len(self.scores)
        return self.scores


def test_utterances_are_recognised_by_the_sum_of_log_probabilities_over_their_frames(
    speech: ModuleType, folder: Path
) -> None:
    data = speech.SpokenDigits(str(folder), test=True)
    scores = torch.zeros(len(data), 10)
    scores[:, 0] = 1.0  # every frame is wrong by a little, ...
    sure = [int((data.recording == recording).nonzero()[0]) for recording in range(5)]
    for frame in sure:  # ... and one frame of each of the first five recordings is right beyond doubt
        scores[frame, data[frame][1]] = 100.0
    with torch.no_grad():
        measured = speech.evaluate(Scripted(scores), data)
    assert len(data.digits) == 8
    assert measured["frame_accuracy"] == pytest.approx(5 / len(data))
    assert measured["utterance_accuracy"] == pytest.approx(5 / 8)


def test_the_network_is_the_papers_with_the_given_width(speech: ModuleType, folder: Path) -> None:
    model = speech.job(data=str(folder), width=24).model()
    shapes = [tuple(layer.weight.shape) for layer in model if isinstance(layer, nn.Linear)]
    assert shapes == [(24, 440), (24, 24), (24, 24), (24, 24), (10, 24)]
    assert sum(isinstance(layer, nn.Sigmoid) for layer in model) == 4
    usual = speech.job(data=str(folder)).model()
    assert [layer.out_features for layer in usual if isinstance(layer, nn.Linear)] == [512, 512, 512, 512, 10]
    with torch.device("meta"):
        papers = speech.job(data=str(folder), width=2560).model()
    assert [layer.out_features for layer in papers if isinstance(layer, nn.Linear)] == [2560, 2560, 2560, 2560, 10]


@pytest.mark.slow
def test_the_example_trains_with_sandblaster_by_option(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = "--cluster.replicas 2 --cluster.engine simulated --algorithm sandblaster --algorithm.max-iterations 4"
    run, script = tmp_path / "run", problems.EXAMPLES / "speech.py"
    given = ["train", str(script), "--data", str(folder), "--width", "32", "--run", str(run), *options.split()]
    monkeypatch.setattr("sys.argv", ["distbelief", *given])
    command()
    summary = read_summary(run / "summary.json")
    assert summary.batch is not None
    assert summary.batch.iterations == 4
    assert set(summary.test) >= {"frame_accuracy", "utterance_accuracy"}


def test_without_recordings_the_message_says_where_they_are_and_what_to_give(
    speech: ModuleType, tmp_path: Path
) -> None:
    for missing in (None, str(tmp_path), str(tmp_path / "nowhere")):
        with pytest.raises(ConfigurationError, match=r"--data(?s:.*)github\.com/Jakobovski/free-spoken-digit-dataset"):
            speech.job(data=missing)


@pytest.mark.parametrize(("test", "frames", "recordings"), [(False, 112_912, 2700), (True, 12_327, 300)])
def test_the_free_spoken_digits_have_the_known_number_of_frames(
    speech: ModuleType, test: bool, frames: int, recordings: int
) -> None:
    if not SHARED_TAR.exists():
        pytest.skip("the Free Spoken Digit recordings are not beside this checkout")
    data = speech.SpokenDigits(str(SHARED_TAR), test)
    assert (len(data), len(data.digits)) == (frames, recordings)
