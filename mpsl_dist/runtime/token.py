"""The shared token of a run, and its proof, both ways, over a plain socket.

    worker -> server   a fresh nonce
    server -> worker   a fresh nonce, sealed: it knows the token
    worker -> server   a text, sealed: so does the worker

and from then on, sealed texts. A seal is the HMAC-SHA256, by the token, of who seals, both nonces
and the text: it cannot be made without the token nor used a second time, and the token itself never
travels. No text is looked at before its seal, nothing is unpickled, every read has a limit and,
until the token is proved, a deadline. Texts are not secret.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import secrets
from asyncio import StreamReader, StreamWriter
from collections.abc import Coroutine, Mapping
from typing import Any

from mpsl_dist.errors import LaunchError

#: The environment variable that names the file with the token.
TOKEN_FILE = "MPSL_DIST_TOKEN_FILE"
#: Bytes of a text, at most.
LONGEST = 64 * 1024
#: Seconds for a peer to prove the token, however slowly it sends.
PATIENCE = 10.0
_GREETING = b"mpsl_dist door 1"
_NONCE = _SEAL = 32
_LEAST = 16


class Stranger(Exception):
    """A peer that did not prove the token; says how that showed."""


def read_token(variables: Mapping[str, str]) -> bytes:
    """Return the token of the run, from the file that ``MPSL_DIST_TOKEN_FILE`` names.

    Parameters
    ----------
    variables : mapping
        The process environment.

    Returns
    -------
    bytes
        Empty where the variable is not set: then anybody can prove it.

    Raises
    ------
    LaunchError
        If the file cannot be read, others may read it, or it has less than 16 bytes.
    """
    path = variables.get(TOKEN_FILE)
    if not path:
        return b""
    try:
        with open(path, "rb") as file:
            mode, token = os.fstat(file.fileno()).st_mode, file.read(LONGEST).strip()
    except OSError as error:
        raise LaunchError(f"{TOKEN_FILE}: {path}: {error.strerror or error}") from error
    if mode & 0o077:
        raise LaunchError(f"{TOKEN_FILE}: others may read {path}: chmod 600 {path}")
    if len(token) < _LEAST:
        raise LaunchError(
            f"{TOKEN_FILE}: {path} holds {len(token)} bytes, at least {_LEAST} are needed: "
            "openssl rand -hex 32 makes some"
        )
    return token


async def challenge(
    reader: StreamReader, writer: StreamWriter, token: bytes
) -> tuple[bytes, bytes]:
    """Have a worker prove the token, as the server; return both nonces, and its text.

    Raises
    ------
    Stranger
        If it does not, in time.
    """
    greeting = await in_time(reader.readexactly(len(_GREETING) + _NONCE))
    if not greeting.startswith(_GREETING):
        raise Stranger("it speaks something else")
    own = secrets.token_bytes(_NONCE)
    nonces = greeting[-_NONCE:] + own
    writer.write(own + sealed(token, b"server", nonces, b""))
    return nonces, await in_time(unsealed(reader, token, b"worker", nonces))


async def answer(reader: StreamReader, writer: StreamWriter, token: bytes, text: bytes) -> bytes:
    """Prove the token, as a worker, to a server that proves it first; return both nonces.

    Raises
    ------
    Stranger
        If it does not, in time.
    """
    own = secrets.token_bytes(_NONCE)
    writer.write(_GREETING + own)
    nonces = own + await in_time(reader.readexactly(_NONCE))
    await in_time(unsealed(reader, token, b"server", nonces))
    writer.write(sealed(token, b"worker", nonces, text))
    return nonces


def sealed(token: bytes, who: bytes, nonces: bytes, text: bytes) -> bytes:
    """Return a text as it travels: its seal, its length, itself."""
    assert len(text) <= LONGEST, "more than a peer reads"
    seal = hmac.digest(token, who + nonces + text, "sha256")
    return seal + len(text).to_bytes(4, "big") + text


async def unsealed(reader: StreamReader, token: bytes, who: bytes, nonces: bytes) -> bytes:
    """Return the next text of a peer.

    Raises
    ------
    Stranger
        If its seal is wrong, or it is too long.
    EOFError
        If the peer is gone.
    """
    seal, size = await reader.readexactly(_SEAL), await reader.readexactly(4)
    length = int.from_bytes(size, "big")
    if length > LONGEST:
        raise Stranger("it sends more than it may")
    text = await reader.readexactly(length)
    if not hmac.compare_digest(seal, sealed(token, who, nonces, text)[:_SEAL]):
        raise Stranger(f"it has another token, or none ({TOKEN_FILE})")
    return text


async def in_time(reading: Coroutine[Any, Any, bytes]) -> bytes:
    """Return what a peer sends within its time.

    Raises
    ------
    Stranger
        If it does not.
    """
    try:
        return await asyncio.wait_for(reading, PATIENCE)
    except asyncio.TimeoutError as error:
        raise Stranger(f"it was silent or slow for {PATIENCE:g} s") from error
    except (OSError, EOFError) as error:
        raise Stranger("it hung up") from error
