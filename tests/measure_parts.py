"""Measure: what the features of the pretrained parts tell, beside those of random weights.

``python tests/measure_parts.py FOLDER`` reads ``fsdd/``, ``flickr8k/`` and ``mnist/`` there and
prints shares of right answers: of a linear classifier on a part's mean feature, or of the nearest
text. It needs the packages of ``mpsl_dist[parts]``.

Shape legend: ``n`` samples, ``f`` features.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.v2 import functional as pictures

from mpsl_dist.data.decode import audio, media, text
from mpsl_dist.data.sets import mnist_fsdd
from mpsl_dist.models.pretrained import PARTS, Part
from mpsl_dist.models.pretrained_weights import load_part

#: Frames that a spoken digit is cut or padded to.
FRAMES = 100


def part_of(name: str, released: bool = True) -> Part:
    """Return a part with its released weights, or with random ones."""
    torch.manual_seed(0)
    part = PARTS[name].build()
    if released:
        load_part(part, name, "it")
    return part.eval()


@torch.no_grad()
def features(part: Part, inputs: Tensor) -> Tensor:
    """Return the mean feature of every input, (n, f); empty places take no part."""
    found = []
    for some in inputs.split(32):
        rows = part(some)
        found.append(rows.sum(1) / (rows != 0).any(-1).sum(1, keepdim=True))
    return torch.cat(found)


def probe(train: Tensor, labels: Tensor, test: Tensor) -> Tensor:
    """Return what a linear classifier says of ``test``, of standardised features."""
    from sklearn.linear_model import LogisticRegression

    mean, deviation = train.mean(0), train.std(0) + 1e-6
    model = LogisticRegression(max_iter=300, C=0.1, class_weight="balanced")
    model.fit(((train - mean) / deviation).numpy(), labels.numpy())
    return torch.from_numpy(model.predict(((test - mean) / deviation).numpy()))


def right(said: Tensor, labels: Tensor) -> float:
    """Return the share of right answers, the mean over the classes."""
    return float(
        torch.stack([(said == k)[labels == k].float().mean() for k in labels.unique()]).mean()
    )


# -- spoken digits -----------------------------------------------------------------------------


def utterances(folder: Path, takes: int) -> tuple[Tensor, Tensor, list[str]]:
    """Return log-mel spectrograms, digits and speakers of the first takes of every digit."""
    found = [path.stem.split("_") for path in sorted(folder.glob("*.wav"))]
    chosen = [name for name in found if int(name[2]) in sorted({int(n[2]) for n in found})[:takes]]
    sounds = torch.stack(
        [
            audio.log_mel(media.read_waveform(folder / f"{'_'.join(name)}.wav"), FRAMES)
            for name in chosen
        ]
    )
    return sounds, torch.tensor([int(name[0]) for name in chosen]), [name[1] for name in chosen]


def unheard(known: Tensor, digits: Tensor, speakers: Sequence[str], speaker: str) -> float:
    """Return the share of right digits of a speaker whom the classifier has never heard."""
    new = torch.tensor([name == speaker for name in speakers])
    return right(probe(known[~new], digits[~new], known[new]), digits[new])


# -- pictures ----------------------------------------------------------------------------------


def captioned(folder: Path) -> tuple[list[str], list[list[str]]]:
    """Return the pictures' names and their captions."""
    captions: dict[str, list[str]] = {}
    for line in (folder / "captions.token").read_text("utf-8").splitlines():
        name, _, caption = line.partition("\t")
        captions.setdefault(name.partition("#")[0], []).append(caption)
    return list(captions), list(captions.values())


def read_pictures(folder: Path, names: Sequence[str], side: int) -> Tensor:
    """Return (n, 3, side, side) pictures, squashed, -1 to 1."""
    read = [media.read_image(folder / "images" / name) for name in names]
    squashed = [pictures.resize(pixels, [side, side], antialias=True) for pixels in read]
    return torch.stack(squashed).float() / 127.5 - 1


def with_dogs(captions: Sequence[Sequence[str]]) -> Tensor:
    """Return whether most captions of a picture speak of a dog, 0 or 1."""
    said = [sum("dog" in caption.lower() for caption in of) > len(of) / 2 for of in captions]
    return torch.tensor(said).long()


def folds(known: Tensor, labels: Tensor, count: int = 5) -> float:
    """Return the share of right answers on every fold by a classifier of the others."""
    said = torch.empty_like(labels)
    fold = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)) % count
    for k in range(count):
        said[fold == k] = probe(known[fold != k], labels[fold != k], known[fold == k])
    return right(said, labels)


# -- texts -------------------------------------------------------------------------------------


def sentences(part: Part, texts: Sequence[str], length: int = 40) -> Tensor:
    """Return embeddings (n, f) of length 1."""
    return functional.normalize(features(part, text.tokenize(texts, length, "wordpiece")), dim=1)


def nearest(asked: Tensor, among: Tensor) -> float:
    """Return how often the nearest of ``among`` is the one at the same place."""
    return ((asked @ among.T).argmax(1) == torch.arange(len(asked))).float().mean().item()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    sounds, digits, speakers = utterances(folder / "fsdd", 15)
    names, captions = captioned(folder / "flickr8k")
    seen, dogs = read_pictures(folder / "flickr8k", names, 224), with_dogs(captions)
    written, numbers = mnist_fsdd._read_mnist(folder / "mnist")
    written, numbers = written[:1_500] * 2 * mnist_fsdd.IMAGE_STD, numbers[:1_500]
    first, second = ([of[k] for of in captions] for k in (0, 1))
    print(f"{len(digits)} utterances, {len(seen)} pictures ({int(dogs.sum())} of dogs)")

    def line(what: str, part: str, weights: str, share: float) -> None:
        print(f"{what:38} {part:18} {weights:9} {share:.3f}", flush=True)

    for weights in ("released", "random"):
        part = part_of("minilm", weights == "released")
        share = nearest(sentences(part, first), sentences(part, second))
        line("another caption of the same picture", "minilm", weights, share)
        known = features(part_of("whisper-tiny", weights == "released"), sounds)
        for speaker in sorted(set(speakers)):
            share = unheard(known, digits, speakers, speaker)
            line(f"digits of {speaker}", "whisper-tiny", weights, share)
        part = part_of("efficientnet-lite0", weights == "released")
        line("a dog or none", "efficientnet-lite0", weights, folds(features(part, seen), dogs))
        line(
            "written digits", "efficientnet-lite0", weights, folds(features(part, written), numbers)
        )
    plain = sounds.unflatten(1, (10, 10)).mean(2).flatten(1)
    for speaker in sorted(set(speakers)):
        share = unheard(plain, digits, speakers, speaker)
        line(f"digits of {speaker}", "ten mean frames", "none", share)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
