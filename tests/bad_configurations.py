"""Configurations that cannot be run, drawn from a seed: one mistake in each."""

from __future__ import annotations

import random
import string
from collections.abc import Iterator
from dataclasses import dataclass

import yaml

from mpsl_dist.config import Experiment, to_dict
from mpsl_dist.typed import flatten


@dataclass(frozen=True)
class Bad:
    """A file, words of the command line, and a part of the message that is due."""

    content: bytes
    words: tuple[str, ...]
    named: str


BASE = {"method": "centralized", "clients": 4, "model": {"image_patch": 4}, "device": "cpu"}
_FLAT = flatten(to_dict(Experiment()))
_FLOATS = [key for key, value in _FLAT.items() if isinstance(value, float)]
_TEXTS = [key for key, value in _FLAT.items() if isinstance(value, str)]
_WHOLE = [key for key, value in _FLAT.items() if type(value) is int]
_SECTIONS = sorted({key.rpartition(".")[0] for key in _FLAT} - {""})
_OPTIONS = ("method_options", "data.options", "model.head.options", "model.tokenizers")
_BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)
)
#: No YAML that stands for an experiment.
_TRICKS = (
    b"",
    b"# nothing\n",
    b"---\n...\n",
    b"null\n",
    b"- 1\n- 2\n",
    b"just a text\n",
    b"7\n",
    b"a: [1, 2\n",
    b"clients: 4\n\tseed: 1\n",
    b"\t\n\tclients: 4\n",
    b"clients: 4\0\n",
    b"clients: \xff\xfe\n",
    "clients: 4\n".encode("utf-16"),
    "name: é\n".encode("latin-1"),
    b"clients: 4\nclients: 5\n",
    b"training: {epochs: 1, epochs: 2}\n",
    b"clients: &a [*a]\n",
    b"&a {clients: *a}\n",
    b"clients: *nobody\n",
    _BOMB.encode(),
    b"[" * 3000,
    b"{a: " * 3000,
    b"- " * 3000,
    b"clients: !!python/object/apply:os.system ['touch hacked']\n",
    b"!!python/object/new:os.system ['touch hacked']\n",
    b"name: !!python/name:os.system\n",
    b"clients: !own 4\n",
    b"clients: !!bool perhaps\n",
    b"clients: !!int ''\n",
    b"clients: !!float x\n",
    b"name: !!binary aGk=\n",
    b"name: !!set {a, b}\n",
    b"name: !!timestamp never\n",
    b"name: 2024-01-01\n",
    b"name: 2024-99-99\n",
    b"data: {options: {when: 2024-01-01}}\n",
    b"method_options: {raw: !!binary aGk=}\n",
    b"? [1, 2]\n: 3\n",
    b"? {a: b}\n: 3\n",
    b"~: 3\n",
    b"1: 3\n",
    b"true: 3\n",
    b"<<: 3\n",
    b"%YAML 7.0\n---\nclients: 4\n",
    b"--- {clients: 4}\n--- {clients: 5}\n",
    b'name: "\\ud800"\n',
    b'output: "a\\0b"\n',
    b"seed: " + b"9" * 5000 + b"\n",
    b"seed: 0x" + b"f" * 5000 + b"\n",
    b"x" * 2_000_000,
    b"\x00" * 100,
    b"\x80\x04\x95",
    b"PK\x03\x04",
)


def generate(count: int, seed: int = 0) -> Iterator[Bad]:
    """Yield configurations, each of another draw; the tricks come round by round."""
    rng = random.Random(seed)
    kinds = (_alien, _wild, _large, _unknown, _nested, _lettered, _override, _text)
    for number in range(count):
        if number % 4 == 0:
            yield Bad(_TRICKS[number // 4 % len(_TRICKS)], (), "config.yaml: ")
        else:
            yield kinds[rng.randrange(len(kinds))](rng)


def _with(key: str, value: object) -> Bad:
    values: dict = yaml.safe_load(yaml.safe_dump(BASE))
    *parents, last = key.split(".")
    node = values
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = value
    return Bad(yaml.safe_dump(values).encode(), (), f"config.yaml: {key}")


def _alien(rng: random.Random) -> Bad:
    key = rng.choice([*_FLOATS, *_TEXTS, *_WHOLE, *_OPTIONS])
    values: list[object] = [[], [[1]], True, [None], "\n" * 5, "x" * 100_000, ["a"] * 500]
    if key in _OPTIONS:
        return _with(key, rng.choice([*values, 7, 1.5]))
    return _with(key, rng.choice([[], [[1]], {"a": 1}, {1: {2: 3}}, [None], ["a"] * 500]))


def _wild(rng: random.Random) -> Bad:
    values = [float("nan"), float("inf"), float("-inf"), "1e999", -(10**300), "nan", "-1e999"]
    return _with(rng.choice(_FLOATS), rng.choice(values))


def _large(rng: random.Random) -> Bad:
    sizes: list[object] = [10**30, 2**63, 2**200, -1, -(2**63), -(10**100), 1e300, 0.5]
    return _with(rng.choice(_WHOLE), rng.choice(sizes))


def _unknown(rng: random.Random) -> Bad:
    letters = string.ascii_letters + "_-éß漢"
    name = "".join(rng.choices(letters, k=rng.choice([1, 5, 30]))) + "zq"
    section = rng.choice(["", *_SECTIONS])
    key = f"{section}.{name}" if section else name
    return _with(key, rng.choice([1, None, {}, [], "a", {"b": {"c": 1}}]))


def _nested(rng: random.Random) -> Bad:
    return _with(rng.choice(_SECTIONS), rng.choice([3, "text", [1], [{"epochs": 3}], 1.5, True]))


def _lettered(rng: random.Random) -> Bad:
    return _with(
        rng.choice([*_WHOLE, *_FLOATS]), rng.choice(["many", "", "1 2", "٣x", "0x", "--1"])
    )


def _override(rng: random.Random) -> Bad:
    key = rng.choice([*_WHOLE, *_FLOATS])
    word, named = rng.choice(
        [
            (f"{key}=many", key),
            (f"{key}=[", key),
            (f"{key}={{a: 1, a: 2}}", key),
            (f"{key}=!!python/name:os.system", key),
            (f"{key}=-7", key),
            (f"{key}.deeper=3", key),
            (f"{key}=2024-01-01", key),
            (f"{key}=\t", key),
            ("a..b=1", "a"),
            (".=1", ": "),
            (f"{key}x=1", f"{key}x"),
        ]
    )
    return Bad(yaml.safe_dump(BASE).encode(), (word,), named)


def _text(rng: random.Random) -> Bad:
    choices: list[tuple[str, object]] = [
        ("name", rng.choice(["a/b", "..", "", ".", "a\\b", "a\nb", "x" * 300])),
        ("device", rng.choice(["gpu", "cuda:x", "", "cuda:-1", "mps"])),
        ("method", rng.choice(["mpsll", "", "os:system", "a" * 5000])),
        ("plugins", [rng.choice(["no.such.module", "", ".relative", "a b"])]),
        ("data.name", rng.choice(["digits", "", "../../etc/passwd", "a:b"])),
        ("weights.encoder", rng.choice(["", "ast", "http://x/y", "timm:", "random:x"])),
        ("model.head.kind", rng.choice(["linearr", "", "embeddings"])),
        ("data.modalities", rng.choice([["smell"], [], "image", [1], ["text", "text"]])),
        ("model.fusion", rng.choice(["middle", "", "EARLY"])),
        ("data.partition.kind", rng.choice(["skewed", "IID"])),
        ("model.tokenizers", rng.choice([{"smell": {}}, {"image": {"a": 1}}, {"image": 3}])),
        ("data.options", rng.choice([{"a": 1}, {1: 2}])),
        ("method_options", rng.choice([{"a": 1}, {"a": float("nan")}])),
        ("model.head.options", rng.choice([{"a": 1}, {1: 2}])),
    ]
    key, value = choices[rng.randrange(len(choices))]
    return Bad(_with(key, value).content, (), key)
