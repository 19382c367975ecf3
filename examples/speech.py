# SPDX-License-Identifier: Apache-2.0
"""The paper's acoustic model on recordings from github.com/Jakobovski/free-spoken-digit-dataset (CC BY-SA 4.0):

distbelief train examples/speech.py --data PATH_OF_CLONE_OR_TAR_ARCHIVE --width 512 --cluster.replicas 4
"""

import functools
import tarfile
from pathlib import Path

import torch
from torch import Tensor, nn

import distbelief as db


def read(source: Path) -> dict[str, bytes]:  # the files {digit}_{speaker}_{index}.wav
    if not source.is_file():
        return {str(path): path.read_bytes() for path in source.rglob("*.wav")}
    with tarfile.open(source) as archive:
        return {m.name: file.read() for m in archive if m.name.endswith(".wav") and (file := archive.extractfile(m))}


def log_mel(wav: bytes) -> Tensor:  # shape (frames, 40): 25 ms every 10 ms at 8 kHz, mean near 0, variance near 1
    sound = torch.frombuffer(bytearray(wav[44:].ljust(2400, b"\0")), dtype=torch.int16) / 2**15  # no header; >= 150 ms
    power: Tensor = torch.fft.rfft(sound.unfold(0, 200, 80) * torch.hamming_window(200), 512).abs().square()
    edges = 700 * (torch.logspace(0, 1, 42, base=1 + 4000 / 700) - 1)  # of 40 triangles, evenly spaced in mel
    rising = (torch.linspace(0, 4000, 257)[:, None] - edges[:-1]) / edges.diff()
    return ((power @ torch.minimum(rising[:, :-1], 1 - rising[:, 1:]).clamp(min=0) + 1e-6).log() + 4.6) / 4


class SpokenDigits(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, source: str, test: bool) -> None:
        files = {Path(path).stem: wav for path, wav in read(Path(source)).items()}
        chosen = {name: log_mel(files[name]) for name in sorted(files) if (int(name.split("_")[2]) < 5) == test}
        self.digits = torch.tensor([int(name[0]) for name in chosen])
        self.frames = torch.cat([nn.functional.pad(e.T, (5, 5), "replicate").T for e in chosen.values()])
        self.recording = torch.repeat_interleave(torch.tensor([len(e) for e in chosen.values()]))  # of each window
        self.windows = (torch.arange(len(self.recording)) + 10 * self.recording)[:, None] + torch.arange(11)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, indices: int | slice | list[int]) -> tuple[Tensor, Tensor]:
        return self.frames[self.windows[indices]].flatten(-2), self.digits[self.recording[indices]]

    __getitems__ = __getitem__  # a whole mini-batch at once


def acoustic_model(width: int) -> nn.Module:
    layers = [nn.Linear(*shape) for shape in ((440, width), *[(width, width)] * 3, (width, 10))]
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight, gain=4)
    return nn.Sequential(*(m for layer in layers[:-1] for m in (layer, nn.Sigmoid())), layers[-1])


def evaluate(model: nn.Module, test: SpokenDigits) -> dict[str, float]:
    scores = model(test[:][0].to(next(model.parameters()).device)).log_softmax(1).cpu()
    sums = torch.zeros(len(test.digits), 10).index_add_(0, test.recording, scores)
    hits = {"frame_accuracy": scores.argmax(1) == test[:][1], "utterance_accuracy": sums.argmax(1) == test.digits}
    return {name: hit.float().mean().item() for name, hit in hits.items()}


def job(data: str | None = None, width: int = 512) -> db.Job:
    if data is None or not read(Path(data)):
        raise db.ConfigurationError(f"no recordings at --data {data}", hint=str(__doc__))
    return db.Job(
        model=functools.partial(acoustic_model, width),
        data=functools.partial(SpokenDigits, data, test=False),
        test=functools.partial(SpokenDigits, data, test=True),
        loss=nn.functional.cross_entropy,
        evaluate=evaluate,
        algorithm=db.Downpour(update_rule=db.adagrad(0.01)),
        epochs=3,
    )


if __name__ == "__main__":
    db.main(job)
