"""Which network interface leads where, by the standard library alone."""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import os
import socket
import struct
import sys
from typing import Any

from mpsl_dist.errors import LaunchError

#: ``SIOCGIFADDR`` of Linux: the IPv4 address of a named interface.
_GET_INTERFACE_ADDRESS = 0x8915

#: An address of the documentation range: the way to it is the default route. Nothing is sent.
_ELSEWHERE = "192.0.2.1"


def host_name() -> str:
    """Return this node's name as its users know it: Slurm's name where there is one."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def interfaces() -> list[str]:
    """Return the names of this host's network interfaces."""
    return [name for _, name in socket.if_nameindex()]


def same_interface_for_nccl() -> None:
    """Have NCCL take RPC's and gloo's interface, where it would take one of its own choice."""
    os.environ.setdefault("NCCL_SOCKET_IFNAME", os.environ["GLOO_SOCKET_IFNAME"])


def existing_interface(name: str, source: str) -> str:
    """Return ``name`` if this host has such an interface.

    Parameters
    ----------
    name : str
    source : str
        The setting that named it, for the error.

    Raises
    ------
    LaunchError
        If this host has no such interface.
    """
    if name not in interfaces():
        raise LaunchError(
            f"{source}: {socket.gethostname()} has no network interface '{name}'; "
            f"it has {', '.join(interfaces())}"
        )
    return name


def loopback() -> str:
    """Return the name of the loopback interface.

    Raises
    ------
    LaunchError
        If there is none.
    """
    for name in ("lo", "lo0"):
        if name in interfaces():
            return name
    raise LaunchError(f"no loopback interface among {', '.join(interfaces())}: {_advice()}")


def interface_towards(address: str) -> str:
    """Return the name of the interface that routes to a host.

    A host whose own name leads to its loopback (Debian writes 127.0.1.1 into /etc/hosts) would be
    unreachable for the others, so then the interface of the default route is taken; a loopback
    address given as such is taken at its word.

    Raises
    ------
    LaunchError
        If the host cannot be reached, or no interface leads to it.
    """
    local = _local_address(address)
    if _is_loopback(local) and not (address == "localhost" or _is_loopback(address)):
        local = _local_address(_ELSEWHERE)
    if _is_loopback(local):
        return loopback()
    for name in interfaces():
        if _interface_address(name) == local:
            return name
    raise LaunchError(
        f"no interface of {socket.gethostname()} has {local}, which leads to the master address "
        f"'{address}': {_advice()}"
    )


def own_loopback(name: str) -> str:
    """Return an address of this host's loopback for those who know ``name``.

    RPC listens on 127.0.0.1, on ports that the kernel chooses, and ends its process on the first
    bytes of whoever speaks another protocol there. At another address those who wait for a port
    that is not open yet meet nobody else, whomever the kernel gives the same port meanwhile.

    Returns
    -------
    str
        One of eight million, the same on each call; 127.0.0.1 where the host has no other (macOS).
    """
    first, *others = hashlib.sha256(name.encode()).digest()[:3]
    address = f"127.{64 + first % 128}.{'.'.join(map(str, others))}"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return "127.0.0.1"
    return address


def listening_address(address: str) -> str:
    """Return the one address of this host at which those arrive who go to ``address``.

    It is ``address`` itself, unless that is a name which leads to loopback on this host alone, or
    belongs to a router that translates it.

    Raises
    ------
    LaunchError
        If the address leads nowhere.
    """
    with contextlib.suppress(OSError):
        family, _, _, _, own = _resolved(address)
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((own[0], 0))
        if not _is_loopback(own[0]) or address == "localhost" or _is_loopback(address):
            return str(own[0])
        return _local_address(_ELSEWHERE)
    return _local_address(address)


def _resolved(address: str) -> tuple[Any, ...]:
    found = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)
    return min(found, key=lambda entry: entry[0] != socket.AF_INET)


def _local_address(address: str) -> str:
    """Return the address of this host from which packets to ``address`` would leave."""
    try:
        family, _, _, _, target = _resolved(address)
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # chooses the route; a datagram socket sends nothing yet
            return str(probe.getsockname()[0])
    except OSError as error:
        raise LaunchError(
            f"{socket.gethostname()} finds no way to the master address '{address}' "
            f"({error.strerror or error}): set MASTER_ADDR to one that it can reach, or {_advice()}"
        ) from error


def _interface_address(name: str) -> str | None:
    if not sys.platform.startswith("linux"):
        return None
    import fcntl  # not on every platform

    request = struct.pack("256s", name.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), _GET_INTERFACE_ADDRESS, request)
        except OSError:  # an interface without an IPv4 address
            return None
    return socket.inet_ntoa(answer[20:24])


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _advice() -> str:
    return "name the interface with runtime.interface or TP_SOCKET_IFNAME"
