"""A client's part in a sum of which the server learns nothing but the sum.

Secure aggregation after Bonawitz et al. (CCS 2017), against a server that is curious but keeps to
the protocol, in three messages:

1. ``offer_key``: every client makes an X25519 key pair for this one sum, and sends the public key.
2. ``mask``: it is told all keys. With each other client it agrees on a seed; the one with the
   smaller number adds the numbers that the seed expands to (ChaCha20), the other takes them off,
   modulo 2^64. The first client, the *locker*, adds a mask of its own besides, the *lock*, and
   sends the lock's seed sealed for each of the others.
3. ``unlock``: once every vector has arrived, the server asks one client for the lock's seed.

The masks cancel in the sum over exactly the clients of message 2, and the lock comes off it once. A
key pair masks one vector and is forgotten by it: whoever begins again, with other clients or the
same, does so with other masks. And a sum that somebody was missing from stays locked: were it
opened by an answer that comes late, its difference to the sum of the others, which is taken
instead, would be the late client's own vector. So nobody unlocks it: the others have begun another
sum, and each knows its last one alone.

Shape legend: ``m`` clients of a sum, ``n`` numbers of a vector.
"""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpsl_dist.config.split_checks import FEWEST_IN_SUM
from mpsl_dist.errors import ConfigError

#: Bytes of a public key, and of a seed.
KEY = 32


def require() -> None:
    """Refuse to go on without the package that masks are made with.

    Raises
    ------
    ConfigError
        If it is not installed here.
    """
    if importlib.util.find_spec("cryptography") is None:
        raise ConfigError(
            "tokenizer_sync.masked: needs the package 'cryptography', which is not installed; "
            "pip install 'mpsl_dist[privacy]', or set tokenizer_sync.masked=false"
        )


def expand(seed: bytes, numbers: int) -> Tensor:
    """Return the numbers that a seed stands for.

    Returns
    -------
    Tensor
        (n,) int64, uniform; ChaCha20's key stream, little-endian. A seed is expanded once.
    """
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

    stream = Cipher(algorithms.ChaCha20(seed, bytes(16)), mode=None).encryptor()
    drawn = np.frombuffer(stream.update(bytes(8 * numbers)), dtype="<i8")
    return torch.from_numpy(drawn.astype(np.int64))


@dataclass(frozen=True)
class Masked:
    """What a client sends of its vector.

    Attributes
    ----------
    vector_n : Tensor
        (n,) int64.
    sealed : Tensor or None
        Of the locker alone: (m, 32) uint8, the lock's seed, legible to one client a row.
    """

    vector_n: Tensor
    sealed: Tensor | None = None


class MaskedSum:
    """A client's part in one masked sum.

    Parameters
    ----------
    client, number : int
        Its own number, and the sum's.
    vector_n : Tensor
        (n,) int64: what it adds.
    """

    def __init__(self, client: int, number: int, vector_n: Tensor) -> None:
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

        self.client = client
        self.number = number
        self._vector_n = vector_n
        self._private: Any = X25519PrivateKey.generate()
        self._public = self._private.public_key().public_bytes_raw()
        self._lock: bytes | None = None
        self._pad = b""

    @property
    def key(self) -> Tensor:
        """Its public key, (32,) uint8."""
        return _tensor(self._public)

    def mask(self, members: Sequence[int], keys: Tensor) -> Masked:
        """Return its vector, masked for a sum over exactly these clients; once.

        Parameters
        ----------
        members : sequence of int
            Ascending.
        keys : Tensor
            (m, 32) uint8, their public keys.

        Raises
        ------
        RuntimeError
            If the key has masked a vector before, or the clients are too few or not what they were
            said to be.
        """
        if self._private is None:
            raise RuntimeError(f"masked sum {self.number}: its key has masked a vector before")
        public = dict(zip(members, map(_bytes, keys), strict=True))
        if len(set(public.values())) < FEWEST_IN_SUM or public.get(self.client) != self._public:
            raise RuntimeError(
                f"masked sum {self.number}: {len(public)} clients, where {FEWEST_IN_SUM} of "
                "different keys are needed, one of them its own"
            )
        agreed = self._agree(public)
        vector_n, self._private = self._vector_n.clone(), None
        for other, (seed, _) in agreed.items():
            mask_n = expand(seed, len(vector_n))
            vector_n += mask_n if self.client < other else -mask_n
        if self.client != members[0]:
            self._pad = agreed[members[0]][1]
            return Masked(vector_n)
        self._lock = secrets.token_bytes(KEY)
        rows = [_xor(self._lock, agreed[n][1]) if n in agreed else bytes(KEY) for n in members]
        return Masked(vector_n + expand(self._lock, len(vector_n)), _tensor(*rows))

    def unlock(self, sealed: Tensor | None) -> Tensor:
        """Return the lock's seed, (32,) uint8.

        Parameters
        ----------
        sealed : Tensor or None
            (32,) uint8, its own row of :attr:`Masked.sealed`; None for the locker.
        """
        if sealed is None:
            assert self._lock is not None
            return _tensor(self._lock)
        return _tensor(_xor(_bytes(sealed), self._pad))

    def _agree(self, public: dict[int, bytes]) -> dict[int, tuple[bytes, bytes]]:
        """Return client -> the seed of the common mask, and the pad that seals the lock for it.

        The number of the sum, its clients and their keys go into the derivation, so that a seed
        belongs to no other set.
        """
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
        from cryptography.hazmat.primitives.hashes import SHA256, Hash
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        said = Hash(SHA256())
        for word in (self.number, *public):
            said.update(word.to_bytes(8, "little"))
        said.update(b"".join(public.values()))
        info, agreed = b"mpsl_dist masked sum " + said.finalize(), {}
        for other, key in public.items():
            if other != self.client:
                shared = self._private.exchange(X25519PublicKey.from_public_bytes(key))
                derived = HKDF(SHA256(), 2 * KEY, None, info).derive(shared)
                agreed[other] = derived[:KEY], derived[KEY:]
        return agreed


def begun(last: MaskedSum | None, number: int) -> MaskedSum:
    """Return a client's part in sum ``number``, which must be the last that it began.

    Raises
    ------
    RuntimeError
        If it is another.
    """
    if last is None or last.number != number:
        raise RuntimeError(f"masked sum {number}: it is not the one that was begun last")
    return last


def _xor(one: bytes, other: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, other, strict=True))


def _bytes(row: Tensor) -> bytes:
    return row.numpy().tobytes()


def _tensor(*rows: bytes) -> Tensor:
    """Return (32,) uint8 of one row, (m, 32) of several."""
    table = torch.from_numpy(np.frombuffer(b"".join(rows), dtype=np.uint8).copy())
    return table if len(rows) == 1 else table.view(len(rows), -1)
