"""Every dataset by name: how it is loaded, where it officially comes from, how large it is.

:data:`DATASETS` is the one table of these facts. A user's own dataset is a :class:`DatasetFacts`
too, under its name in a mapping ``datasets`` of a plugin module, see :mod:`mpsl_dist.plugins`.

Archives have a checksum where one is widely published. For the others the first download's SHA-256
is written beside the data (``downloads.json``), and every later download must agree with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mpsl_dist import plugins
from mpsl_dist.data.dataset import Splits, chosen
from mpsl_dist.errors import DataError

#: What an experiment may ask of a dataset, under ``data`` of its configuration.
Option = Literal[
    "text_length",
    "image_size",
    "audio_frames",
    "modalities",
    "on_error",
    "max_missing",
    "cache",
    "needs",
    "tokens",
    "sounds",
]
#: Captions taken of every picture of a retrieval dataset, the first ones.
CAPTIONS = 5


@dataclass(frozen=True)
class Archive:
    """One file to download.

    Attributes
    ----------
    into : str
        Folder under ``data.root`` that it is unpacked into (or saved to).
    checksum : str or None
        ``md5:…`` or ``sha256:…``; None where none is published.
    extract : bool
        Whether to unpack it; otherwise it is kept as it is.
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
class DatasetFacts:
    """What is known of a dataset before any of its files is there.

    Attributes
    ----------
    load : str or callable
        A function ``load(root, **given) -> Splits``, or its name as ``"package.module:function"``,
        which is imported when the dataset is chosen. ``root`` is the configuration's ``data.root``,
        None where it is not set; ``given`` holds options named in ``reads``, and ``options`` where
        the dataset has a dataclass for them.
    reads : tuple of str
        The options of an experiment that it has a use for, of :data:`Option`. All others are
        refused, except ``text_length``, which is not passed on then, and, of what is read from
        files, ``tokens`` (``wordpiece``) and ``sounds`` (``whisper``), which pretrained parts of
        the model ask for, see :func:`mpsl_dist.data.load`. An option that the experiment
        leaves out is not passed either: the default of ``load`` counts. ``needs`` is no key but
        what this host will use: ``("train",)``, ``("test",)`` or both.
    options : type or None
        A frozen dataclass of options that this dataset alone has. ``load`` receives an instance as
        ``options``, made and checked from ``data.options`` of the configuration.
    on_error : str
        ``raise`` or ``skip``: what becomes of files that are missing or damaged where the
        experiment does not say. Passed to a loader that reads ``on_error``.
    files : bool
        Whether it is read from files under ``data.root``, which ``data check`` can look at.
    place : str
        Where it officially comes from, in words; a part of every message about missing files.
    archives : tuple of Archive
        What ``data download`` may fetch.
    by_hand : str
        What a person must do, where the licence or the size forbids a download by a program.
    shapes : mapping of str to tuple of int
        One sample's shape per modality at default options, in the order in which modalities are
        fused: image (c, h, w), audio (frames, mel bins), text (tokens,). Empty where it depends on
        the files; then the cost of training is only known once they are there.
    classes : int
        Number of classes, 0 for retrieval. Counts only together with ``shapes``.
    samples : tuple of int or None
        Training and test samples of the whole dataset (in retrieval: pairs of a picture and a
        caption); None where it depends on the files.
    confirmed : bool
        Whether ``samples`` was counted in the official files, so that ``data check`` may call a
        copy with fewer of them incomplete.
    """

    load: str | Callable[..., Splits]
    reads: tuple[Option, ...] = ()
    options: type | None = None
    on_error: Literal["raise", "skip"] = "raise"
    files: bool = True
    place: str = ""
    archives: tuple[Archive, ...] = ()
    by_hand: str = ""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    classes: int = 0
    samples: tuple[int, int] | None = None
    confirmed: bool = True

    def shapes_at(
        self,
        text_length: int | None = None,
        image_size: int | None = None,
        audio_frames: int | None = None,
        mel_bins: int | None = None,
        modalities: Sequence[str] | None = None,
    ) -> dict[str, tuple[int, ...]]:
        """Return ``shapes`` as these options of an experiment change them; None leaves its own.

        Parameters
        ----------
        text_length : int, optional
            Tokens of a text.
        image_size : int, optional
            Side of a picture in pixels.
        audio_frames : int, optional
            Frames of a spectrogram.
        mel_bins : int, optional
            Mel bins of a frame.
        modalities : sequence of str, optional
            What of them is read, where there is a choice.

        Raises
        ------
        DataError
            If there is no such modality.
        """
        shapes = dict(self.shapes)
        if "text" in shapes and "text_length" in self.reads and text_length is not None:
            shapes["text"] = (text_length,)
        if "image" in shapes and "image_size" in self.reads and image_size is not None:
            shapes["image"] = (shapes["image"][0], image_size, image_size)
        for name in {"audio", "audio2"} & shapes.keys():
            if "audio_frames" in self.reads and audio_frames is not None:
                shapes[name] = (audio_frames, shapes[name][1])
        if "audio" in shapes and mel_bins is not None:
            shapes["audio"] = (shapes["audio"][0], mel_bins)
        return chosen(shapes, modalities) if "modalities" in self.reads else shapes


def find(name: str, modules: Sequence[str] = ()) -> DatasetFacts:
    """Return the facts of a dataset: one of ours, of a plugin module, or of an entry point.

    Parameters
    ----------
    name : str
        ``data.name`` of the configuration.
    modules : sequence of str
        The experiment's ``plugins``.

    Raises
    ------
    DataError
        If nothing has this name.
    ConfigError
        If a plugin module cannot be imported, or takes a name of ours.
    """
    return plugins.find("datasets", name, DATASETS, modules, "data.name", DataError)


def source(name: str) -> str:
    """Return where a dataset of ours comes from, as a part of a message."""
    return f"official place: {DATASETS[name].place}"


_SETS = "mpsl_dist.data.sets"
_ON_DISK: tuple[Option, ...] = ("on_error", "max_missing", "cache")
_PICTURE, _SOUND, _TEXT = (3, 224, 224), (1024, 128), (77,)

_COCO = "http://images.cocodataset.org"
_HUB = "https://huggingface.co/datasets"
_UCF = "https://www.crcv.ucf.edu/data/UCF101"
_COCO_IMAGES = (
    Archive(f"{_COCO}/zips/train2014.zip", "ms-coco", "md5:0da8c0bd3d6becc4dcb32757491aca88"),
    Archive(f"{_COCO}/zips/val2014.zip", "ms-coco", "md5:a3d79f5ed8d289b7a7554ce06a5782b3"),
)
_KARPATHY = Archive(
    "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip", "karpathy"
)
_KARPATHY_PLACE = "Karpathy's caption_datasets.zip (cs.stanford.edu/people/karpathy/deepimagesent)"

#: Every dataset of ours.
DATASETS: dict[str, DatasetFacts] = {
    "digits-qa": DatasetFacts(
        f"{_SETS}.digits_qa:load",
        reads=("text_length", "tokens"),
        files=False,
        shapes={"image": (1, 8, 8), "text": (16,)},
        classes=12,
        samples=(5_768, 1_420),
    ),
    "digits-captions": DatasetFacts(
        f"{_SETS}.digits_captions:load",
        reads=("text_length", "tokens"),
        files=False,
        shapes={"image": (1, 8, 24), "text": (16,)},
        samples=(CAPTIONS * 1_600, CAPTIONS * 200),
    ),
    "mnist-fsdd": DatasetFacts(
        f"{_SETS}.mnist_fsdd:load",
        reads=("audio_frames", "modalities", "sounds"),
        place="MNIST: yann.lecun.com/exdb/mnist; spoken digits: the recordings of "
        "github.com/Jakobovski/free-spoken-digit-dataset",
        by_hand="put the two gzipped IDX files into mnist/ and the wav files into fsdd/",
        shapes={"image": (1, 28, 28), "audio": (64, 128)},
        classes=10,
        # Drawn from the files, which hold more.
        samples=(4_000, 1_000),
        confirmed=False,
    ),
    "mnist-fsdd-2": DatasetFacts(
        f"{_SETS}.mnist_fsdd:load_sensors",
        reads=("audio_frames",),
        place="as of mnist-fsdd",
        by_hand="put the two gzipped IDX files into mnist/ and the wav files into fsdd/",
        shapes={"image": (1, 28, 28), "audio": (64, 128), "audio2": (64, 128)},
        classes=10,
        # Drawn from the files, which hold more.
        samples=(4_000, 1_000),
        confirmed=False,
    ),
    "coco-qa": DatasetFacts(
        f"{_SETS}.image_text:load_coco_qa",
        reads=("text_length", "image_size", *_ON_DISK),
        place="COCO-QA: cs.toronto.edu/~mren/research/imageqa/data/cocoqa; "
        "its pictures are MS-COCO 2014: cocodataset.org",
        archives=(
            Archive(
                "http://www.cs.toronto.edu/~mren/imageqa/data/cocoqa/cocoqa-2015-05-17.zip",
                "coco-qa",
            ),
            *_COCO_IMAGES,
        ),
        shapes={"image": _PICTURE, "text": _TEXT},
        classes=430,
        samples=(78_736, 38_948),
    ),
    "t4sa": DatasetFacts(
        f"{_SETS}.image_text:load_t4sa",
        reads=("text_length", "image_size", *_ON_DISK),
        place="B-T4SA: t4sa.it (access on request)",
        by_hand="ask for access at t4sa.it; unpack raw_tweets_text.csv, b-t4sa_train.txt, "
        "b-t4sa_test.txt and data/ into b-t4sa/",
        shapes={"image": _PICTURE, "text": _TEXT},
        classes=3,
        # The official lists are only to be had on request.
        samples=(368_586, 51_000),
        confirmed=False,
    ),
    "kinetics-sounds": DatasetFacts(
        f"{_SETS}.video_audio:load_kinetics_sounds",
        reads=("image_size", "audio_frames", *_ON_DISK),
        place="Kinetics-400: github.com/cvdfoundation/kinetics-dataset; the list of clips: "
        "github.com/weiguoPian/AV-CIL_ICCV2023",
        by_hand="download the training part of Kinetics-400 (k400_downloader.sh of the CVD "
        "foundation), and copy or link the clips of the 30 classes into kinetics-sounds/<class>/",
        shapes={"image": _PICTURE, "audio": _SOUND},
        classes=30,
        samples=(15_376, 3_844),
    ),
    "ucf101": DatasetFacts(
        f"{_SETS}.video_audio:load_ucf101",
        reads=("image_size", "audio_frames", *_ON_DISK),
        on_error="skip",
        place="UCF101: crcv.ucf.edu/data/UCF101.php",
        archives=(
            Archive(f"{_UCF}/UCF101.rar", "ucf101"),
            Archive(f"{_UCF}/UCF101TrainTestSplits-RecognitionTask.zip", "ucf101"),
        ),
        shapes={"image": _PICTURE, "audio": (98, 128)},
        classes=51,
        samples=(4_893, 1_943),
    ),
    "meld": DatasetFacts(
        f"{_SETS}.video_audio:load_meld",
        reads=("text_length", "audio_frames", *_ON_DISK),
        on_error="skip",
        place="MELD: affective-meld.github.io",
        archives=(Archive(f"{_HUB}/declare-lab/MELD/resolve/main/MELD.Raw.tar.gz", "meld"),),
        shapes={"audio": (766, 128), "text": _TEXT},
        classes=7,
        samples=(11_096, 2_610),
    ),
    "flickr8k": DatasetFacts(
        f"{_SETS}.captions:load_flickr8k",
        reads=("text_length", "image_size", *_ON_DISK),
        place="Flickr8k: nlp.cs.illinois.edu/HockenmaierGroup/8k-pictures.html (on request); "
        f"splits and captions: {_KARPATHY_PLACE}",
        by_hand="ask for the pictures and put them into flickr8k/images/; unpack "
        "dataset_flickr8k.json into karpathy/",
        shapes={"image": _PICTURE, "text": _TEXT},
        samples=(CAPTIONS * 6_000, CAPTIONS * 1_000),
    ),
    "flickr30k": DatasetFacts(
        f"{_SETS}.captions:load_flickr30k",
        reads=("text_length", "image_size", *_ON_DISK),
        place="Flickr30k: the dataset nlphuji/flickr30k of huggingface.co; "
        f"splits and captions: {_KARPATHY_PLACE}",
        archives=(
            Archive(f"{_HUB}/nlphuji/flickr30k/resolve/main/flickr30k-images.zip", "flickr30k"),
            _KARPATHY,
        ),
        shapes={"image": _PICTURE, "text": _TEXT},
        samples=(CAPTIONS * 29_000, CAPTIONS * 1_000),
    ),
    "ms-coco": DatasetFacts(
        f"{_SETS}.captions:load_ms_coco",
        reads=("text_length", "image_size", *_ON_DISK),
        place=f"MS-COCO 2014: cocodataset.org; splits: {_KARPATHY_PLACE}",
        archives=(*_COCO_IMAGES, _KARPATHY),
        shapes={"image": _PICTURE, "text": _TEXT},
        samples=(CAPTIONS * 82_783, CAPTIONS * 5_000),
    ),
    "manifest": DatasetFacts(
        f"{_SETS}.manifest:load",
        reads=("text_length", "image_size", "audio_frames", "modalities", "needs", *_ON_DISK),
    ),
}
