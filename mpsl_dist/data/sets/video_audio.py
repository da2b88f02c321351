"""``kinetics-sounds``, ``ucf101`` and ``meld``: clips with a sound track.

Layout under ``data.root``:

``kinetics-sounds``
    ``kinetics-sounds/<class>/*.mp4``, from the training part of Kinetics-400; the split in
    ``kinetics-sounds/{train,test}.txt``, one path ``<class>/<clip>.mp4`` a line. Without these
    lists every fifth clip of a class, by name, is for testing: the same 4 to 1 as the list of the
    paper, not the same clips.
``ucf101``
    ``ucf101/UCF-101/<Class>/v_*.avi`` (or ``ucf101/<Class>/``);
    ``ucf101/ucfTrainTestlist/{classInd,trainlist01,testlist01}.txt``.
``meld``
    ``meld/{train,dev,test}_sent_emo.csv``; clips in ``train_splits/``, ``dev_splits_complete/`` and
    ``output_repeated_splits_test/``, named ``dia<D>_utt<U>.mp4``; all may lie in ``MELD.Raw/``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from mpsl_dist.data import catalog
from mpsl_dist.data.dataset import Splits
from mpsl_dist.data.decode.samples import OnError, Sample, View
from mpsl_dist.data.sets import listing
from mpsl_dist.data.sets.index import Samples
from mpsl_dist.data.sets.tables import MAX_MISSING, Files, Table, build
from mpsl_dist.errors import DataError

_KINETICS_SOUNDS = """
blowing nose, blowing out candles, bowling, chopping wood, dribbling basketball, laughing,
playing accordion, playing bagpipes, playing bass guitar, playing clarinet, playing drums,
playing guitar, playing harmonica, playing keyboard, playing organ, playing piano, playing
saxophone, playing trombone, playing trumpet, playing violin, playing xylophone, ripping paper,
shoveling snow, shuffling cards, singing, stomping grapes, tap dancing, tapping guitar, tapping
pen, tickling
"""
_UCF_SOUNDS = """
ApplyEyeMakeup, ApplyLipstick, Archery, BabyCrawling, BalanceBeam, BandMarching, BasketballDunk,
BlowDryHair, BlowingCandles, BodyWeightSquats, Bowling, BoxingPunchingBag, BoxingSpeedBag,
BrushingTeeth, CliffDiving, CricketBowling, CricketShot, CuttingInKitchen, FieldHockeyPenalty,
FloorGymnastics, FrisbeeCatch, FrontCrawl, Haircut, Hammering, HammerThrow, HandstandPushups,
HandstandWalking, HeadMassage, IceDancing, Knitting, LongJump, MoppingFloor, ParallelBars,
PlayingCello, PlayingDaf, PlayingDhol, PlayingFlute, PlayingSitar, Rafting, ShavingBeard,
Shotput, SkyDiving, SoccerPenalty, StillRings, SumoWrestling, Surfing, TableTennisShot, Typing,
UnevenBars, WallPushups, WritingOnBoard
"""


def _names(listed: str) -> tuple[str, ...]:
    return tuple(" ".join(name.split()) for name in listed.split(","))


#: The 30 classes of Kinetics-Sounds in the class-incremental list that the paper takes. The set of
#: "Look, Listen and Learn" has 31 names in Kinetics-400: that list leaves out "mowing lawn".
KINETICS_SOUNDS = _names(_KINETICS_SOUNDS)
#: The 51 classes of UCF101 whose clips have sound: those that UCF50 did not have yet.
UCF_SOUNDS = _names(_UCF_SOUNDS)
EMOTIONS = ("anger", "disgust", "fear", "joy", "neutral", "sadness", "surprise")

#: MELD's typographic marks as plain ones, as in the released code.
_PLAIN = str.maketrans({"’": "'", "‘": "'", "\x92": "'", "“": '"', "”": '"', "–": "-", "—": "-"})


def load_kinetics_sounds(
    root: str | Path | None,
    *,
    image_size: int = 224,
    audio_frames: int = 1024,
    on_error: OnError = "raise",
    max_missing: float = MAX_MISSING,
    cache: str | Path | None = None,
) -> Splits:
    """Read Kinetics-Sounds: a frame and the sound around it, one of 30 classes (alphabetical).

    Training takes a random moment of the clip, a random crop and colours; testing the middle.

    Parameters
    ----------
    root : str or Path
        Folder that holds ``kinetics-sounds/``.
    image_size : int
        Side of the square picture, in pixels.
    audio_frames : int
        Frames of 10 ms; 1024 are 10.255 s, longer than most clips.
    on_error, max_missing, cache
        As in :func:`mpsl_dist.data.sets.image_text.load_coco_qa`.
    """
    source = catalog.source("kinetics-sounds")
    home = listing.folder(root, "kinetics-sounds", "kinetics-sounds", source)
    lists = [home / "train.txt", home / "test.txt"]
    if any(path.exists() for path in lists):
        paths = [[line for line in listing.lines(path, source) if line] for path in lists]
    else:
        paths = _split_fifth(home)
    tables = [_classed(home, split, KINETICS_SOUNDS, source) for split in paths]
    view = View(("image", "audio"), image_size, crop=True, audio_frames=audio_frames)
    return build(
        "kinetics-sounds",
        *tables,
        KINETICS_SOUNDS,
        view,
        Files(on_error, max_missing, cache),
        source=source,
    )


def _split_fifth(home: Path) -> list[list[str]]:
    """List the clips of every class: four of five for training, every fifth for testing."""
    train, test = [], []
    for name in KINETICS_SOUNDS:
        for position, path in enumerate(sorted((home / name).glob("*.mp4"))):
            (test if position % 5 == 4 else train).append(f"{name}/{path.name}")
    return [train, test]


def _classed(home: Path, paths: Sequence[str], classes: Sequence[str], source: str) -> Table:
    """Make a split of paths ``<class>/<clip>``."""
    number = {name: position for position, name in enumerate(classes)}
    folders = [path.partition("/")[0] for path in paths]
    unknown = sorted(set(folders) - number.keys())
    if unknown:
        raise DataError(f"{home}: unknown class '{unknown[0]}'; {source}")
    samples = Samples.of((Sample(video=str(home / path)) for path in paths), home)
    return Table(samples, [number[name] for name in folders])


def load_ucf101(
    root: str | Path | None,
    *,
    image_size: int = 224,
    audio_frames: int = 98,
    split: int = 1,
    all_classes: bool = False,
    on_error: OnError = "skip",
    max_missing: float = MAX_MISSING,
    cache: str | Path | None = None,
) -> Splits:
    """Read UCF101: a frame and a second of sound around it, one of 51 classes (alphabetical).

    Half of the 101 classes come from silent films; the official split 1 lists 4,901 training and
    1,944 test clips of the 51 others. Nine of these have no sound track (the paper counts 4,893
    and 1,943), which is why ``on_error`` is ``skip`` here.

    Parameters
    ----------
    root : str or Path
        Folder that holds ``ucf101/``.
    split : int
        The official split, 1 to 3.
    all_classes : bool
        Take all 101 classes, for pictures alone: no ``audio``.
    image_size, audio_frames, on_error, max_missing, cache
        As in :func:`load_kinetics_sounds`; 98 frames are 1 s.
    """
    source = catalog.source("ucf101")
    home = listing.folder(root, "ucf101", "ucf101", source)
    lists = home / "ucfTrainTestlist"
    index = [line.split() for line in listing.lines(lists / "classInd.txt", source) if line]
    names = sorted(fields[-1] for fields in index)
    classes = names if all_classes else [name for name in names if name in UCF_SOUNDS]
    clips = home / "UCF-101" if (home / "UCF-101").is_dir() else home
    tables = []
    for part in ("train", "test"):
        listed = listing.lines(lists / f"{part}list{split:02}.txt", source)
        paths = [line.split()[0] for line in listed if line]
        chosen = [path for path in paths if all_classes or path.split("/")[0] in UCF_SOUNDS]
        tables.append(_classed(clips, chosen, classes, source))
    modalities = ("image",) if all_classes else ("image", "audio")
    view = View(modalities, image_size, crop=True, audio_frames=audio_frames)
    files = Files(on_error, max_missing, cache)
    return build("ucf101", *tables, classes, view, files, source=source)


def load_meld(
    root: str | Path | None,
    *,
    text_length: int = 77,
    audio_frames: int = 766,
    on_error: OnError = "skip",
    max_missing: float = MAX_MISSING,
    cache: str | Path | None = None,
) -> Splits:
    """Read MELD: an utterance's sound and text, one of seven emotions (alphabetical).

    Train and dev are the training set, as in the paper; test is the official one. The sound is up
    to 7.68 s of the utterance, from its start at test, from a random moment in training, then
    silence. (The released code takes 2.56 s and puts them somewhere into 7.68 s of silence, at
    random even at test.) One training clip (dia125_utt3) is damaged and one dev clip (dia110_utt7)
    missing in the official archive, which is why ``on_error`` is ``skip`` here.

    Parameters
    ----------
    root : str or Path
        Folder that holds ``meld/``.
    text_length, audio_frames, on_error, max_missing, cache
        As in the other loaders; 766 frames are 7.68 s.
    """
    source = catalog.source("meld")
    home = listing.folder(root, "meld", "meld", source)
    home = home / "MELD.Raw" if (home / "MELD.Raw").is_dir() else home
    folders = {
        "train": "train_splits",
        "dev": "dev_splits_complete",
        "test": "output_repeated_splits_test",
    }
    train, dev, test = (
        _read_utterances(home / f"{split}_sent_emo.csv", home / clips, source)
        for split, clips in folders.items()
    )
    both = Samples.of(chain(train.samples, dev.samples), home)
    joined = Table(both, [*train.labels, *dev.labels])
    view = View(("audio", "text"), audio_frames=audio_frames, audio_at=0.0, text_length=text_length)
    files = Files(on_error, max_missing, cache)
    return build("meld", joined, test, EMOTIONS, view, files, source=source)


def _read_utterances(path: Path, clips: Path, source: str) -> Table:
    columns = ("Utterance", "Emotion", "Dialogue_ID", "Utterance_ID")
    samples, labels = Samples(clips), []
    for row in listing.rows(path, columns, source):
        emotion = row["Emotion"].strip().lower()
        if emotion not in EMOTIONS:
            raise DataError(f"{path}: unknown emotion '{emotion}'; known: {', '.join(EMOTIONS)}")
        clip = clips / f"dia{row['Dialogue_ID']}_utt{row['Utterance_ID']}.mp4"
        utterance = row["Utterance"].translate(_PLAIN).replace("…", "...")
        samples.append(Sample(audio=str(clip), text=utterance))
        labels.append(EMOTIONS.index(emotion))
    return Table(samples, labels)
