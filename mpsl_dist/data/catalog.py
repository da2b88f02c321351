"""Where each dataset officially comes from, how large it is, and what may be downloaded.

Checksums are given where they are widely published. For the others the first download's SHA-256
is written beside the data (``downloads.json``), and every later download must agree with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Archive:
    """One file to download.

    Attributes
    ----------
    into : str
        Folder under ``data.root`` that it is unpacked into (or saved to).
    checksum : str or None
        ``md5:…`` or ``sha256:…``; None where none is published.
    """

    url: str
    into: str
    checksum: str | None = None
    extract: bool = True

    @property
    def name(self) -> str:
        """The file's name."""
        return self.url.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Entry:
    """A dataset's official place.

    Attributes
    ----------
    place : str
        Where to get it, in words; a part of every message about missing files.
    samples : tuple of int or None
        Training and test samples of the whole dataset; None where they are not confirmed.
    by_hand : str
        What a person must do, where the licence or the size forbids a download by a program.
    """

    place: str
    samples: tuple[int, int] | None = None
    archives: tuple[Archive, ...] = field(default=())
    by_hand: str = ""


_COCO = "http://images.cocodataset.org"
_HUB = "https://huggingface.co/datasets"
_COCO_IMAGES = (
    Archive(f"{_COCO}/zips/train2014.zip", "ms-coco", "md5:0da8c0bd3d6becc4dcb32757491aca88"),
    Archive(f"{_COCO}/zips/val2014.zip", "ms-coco", "md5:a3d79f5ed8d289b7a7554ce06a5782b3"),
)
_KARPATHY = Archive(
    "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip", "karpathy"
)
_UCF = "https://www.crcv.ucf.edu/data/UCF101"

CATALOG: dict[str, Entry] = {
    "coco-qa": Entry(
        "COCO-QA: cs.toronto.edu/~mren/research/imageqa/data/cocoqa; "
        "its pictures are MS-COCO 2014: cocodataset.org",
        (78_736, 38_948),
        (
            Archive(
                "http://www.cs.toronto.edu/~mren/imageqa/data/cocoqa/cocoqa-2015-05-17.zip",
                "coco-qa",
            ),
            *_COCO_IMAGES,
        ),
    ),
    "t4sa": Entry(
        "B-T4SA: t4sa.it (access on request)",
        by_hand="ask for access at t4sa.it; unpack raw_tweets_text.csv, b-t4sa_train.txt, "
        "b-t4sa_test.txt and data/ into b-t4sa/",
    ),
    "kinetics-sounds": Entry(
        "Kinetics-400: github.com/cvdfoundation/kinetics-dataset; the list of clips: "
        "github.com/weiguoPian/AV-CIL_ICCV2023",
        (15_376, 3_844),
        by_hand="download the training part of Kinetics-400 (k400_downloader.sh of the CVD "
        "foundation), and copy or link the clips of the 30 classes into kinetics-sounds/<class>/",
    ),
    "ucf101": Entry(
        "UCF101: crcv.ucf.edu/data/UCF101.php",
        (4_893, 1_943),
        (
            Archive(f"{_UCF}/UCF101.rar", "ucf101"),
            Archive(f"{_UCF}/UCF101TrainTestSplits-RecognitionTask.zip", "ucf101"),
        ),
    ),
    "meld": Entry(
        "MELD: affective-meld.github.io",
        (11_096, 2_610),
        (Archive(f"{_HUB}/declare-lab/MELD/resolve/main/MELD.Raw.tar.gz", "meld"),),
    ),
    "flickr30k": Entry(
        "Flickr30k: the dataset nlphuji/flickr30k of huggingface.co; splits and captions: "
        "Karpathy's caption_datasets.zip (cs.stanford.edu/people/karpathy/deepimagesent)",
        (145_000, 5_000),
        (
            Archive(f"{_HUB}/nlphuji/flickr30k/resolve/main/flickr30k-images.zip", "flickr30k"),
            _KARPATHY,
        ),
    ),
    "ms-coco": Entry(
        "MS-COCO 2014: cocodataset.org; splits: Karpathy's caption_datasets.zip "
        "(cs.stanford.edu/people/karpathy/deepimagesent)",
        (413_915, 25_000),
        (*_COCO_IMAGES, _KARPATHY),
    ),
    "mnist-fsdd": Entry(
        "MNIST: yann.lecun.com/exdb/mnist; spoken digits: the recordings of "
        "github.com/Jakobovski/free-spoken-digit-dataset",
        by_hand="put the two gzipped IDX files into mnist/ and the wav files into fsdd/",
    ),
}


def source(name: str) -> str:
    """Say where a dataset comes from, as a part of a message."""
    return f"official place: {CATALOG[name].place}"
