"""Who am I among the processes of this run, and where do they meet?

The one reader of the launchers' environment variables. torchrun is recognised by the ``env://``
variables that it sets, Slurm (srun by hand or through submitit: the same variables) by those of a
job *step*. ``srun torchrun`` carries both sets; then torchrun's win, because Slurm counts agents
and torchrun counts workers. Everything here is a function of a mapping and imports no torch, so
that it can be tested, and can fail, before anything heavy is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from mpsl_dist.runtime import network
from mpsl_dist.runtime.network import LaunchError

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: Without one of these a process was not started as a rank; an address alone makes no rank.
TORCHRUN_MARKS = ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")

#: Slurm numbers the batch script, the interactive shell and the like from here on: no ranks.
SLURM_SPECIAL_STEP = 0xFFFFFFF0

#: Below 32768, where Linux takes the ports of outgoing connections from.
SLURM_PORTS = range(15000, 25000)


#: Set by :mod:`mpsl_dist.runtime.launch`: the private folder where the processes of a run meet.
LAUNCH_FOLDER = "MPSL_DIST_LAUNCH_FOLDER"

#: Scheme of :mod:`mpsl_dist.runtime.meeting`.
MEETING = "rank0"


@dataclass(frozen=True)
class Environment:
    """This process's rank in the run, and where the ranks meet, as the launcher tells it.

    Attributes
    ----------
    launcher : {'mpsl_dist', 'torchrun', 'slurm', 'none'}
        Who started the processes; ``mpsl_dist`` is the run's own command.
    rank, world : int
        This process among all, from 0; how many there are.
    local_rank, local_world : int
        The same among the processes of this node.
    node, nodes : int
        The same for the nodes.
    address, port : str, int
        Where the processes meet.
    init_method : str
        The same as torch takes it: ``env://`` under torchrun whose agent hosts the store;
        ``rank0://address:port`` where rank 0 hosts it, on this address alone, which on one host is
        an address of loopback that is the run's own; a file by our own command.
    socket_interface : str or None
        ``TP_SOCKET_IFNAME``, where the user set it.
    folder : str or None
        The private folder of a launch by our own command.
    """

    launcher: Literal["mpsl_dist", "torchrun", "slurm", "none"]
    rank: int
    world: int
    local_rank: int
    local_world: int
    node: int
    nodes: int
    address: str
    port: int
    init_method: str
    socket_interface: str | None = None
    folder: str | None = None

    @property
    def one_host(self) -> bool:
        """Whether every process of the run is on this host."""
        return self.nodes == 1

    def interface(self, chosen: str | None = None) -> str:
        """Return the network interface that this process's RPC traffic goes through.

        Parameters
        ----------
        chosen : str, optional
            The user's choice (``runtime.interface``); wins over ``TP_SOCKET_IFNAME``.

        Returns
        -------
        str
            The choice if there is one; else loopback on one host; else the interface that routes
            to the master address.

        Raises
        ------
        LaunchError
            If the choice does not exist on this host, or no interface leads to the master.
        """
        named = chosen or self.socket_interface
        if named:
            source = "runtime.interface" if chosen else "TP_SOCKET_IFNAME"
            return network.existing_interface(named, source)
        if self.one_host:
            return network.loopback()
        return network.interface_towards(self.address)


def alone() -> Environment:
    """Return the environment of a run of one process, which meets nobody."""
    return Environment("none", 0, 1, 0, 1, 0, 1, "localhost", 0, "")


def resolve(variables: Mapping[str, str]) -> Environment | None:
    """Read the launcher's variables.

    Parameters
    ----------
    variables : mapping
        The process environment, ``os.environ``.

    Returns
    -------
    Environment or None
        None for a process that no launcher started as one of several ranks: a plain shell, a
        batch script without ``srun``, an allocation's shell, an ``srun`` of one task.

    Raises
    ------
    LaunchError
        If the variables are incomplete, malformed or contradict each other; names them.
    """
    if "TORCHELASTIC_RUN_ID" in variables:
        return _from_torchrun(variables)
    slurm = _from_slurm(variables) if _in_slurm_step(variables) else None
    if slurm is None:
        marked = any(name in variables for name in TORCHRUN_MARKS)
        return _from_torchrun(variables) if marked else None
    _refuse_contradiction(variables, slurm)
    return slurm


def _from_torchrun(variables: Mapping[str, str]) -> Environment:
    _require(variables, TORCHRUN, "torchrun")
    rank, world = _number(variables, "RANK"), _number(variables, "WORLD_SIZE", minimum=1)
    local_rank = _number(variables, "LOCAL_RANK")
    local_world = _number(variables, "LOCAL_WORLD_SIZE", minimum=1)
    node, nodes = rank // local_world, -(-world // local_world)
    if "GROUP_RANK" in variables and "GROUP_WORLD_SIZE" in variables:
        # Nodes may run unequal numbers of workers, so torchrun's own count is better.
        node = _number(variables, "GROUP_RANK")
        nodes = _number(variables, "GROUP_WORLD_SIZE", minimum=1)
    _require_below(("RANK", rank), ("WORLD_SIZE", world))
    _require_below(("LOCAL_RANK", local_rank), ("LOCAL_WORLD_SIZE", local_world))
    _require_below(("GROUP_RANK", node), ("GROUP_WORLD_SIZE", nodes))
    if local_world > world:
        raise LaunchError(f"LOCAL_WORLD_SIZE={local_world} exceeds WORLD_SIZE={world}")
    folder, port = variables.get(LAUNCH_FOLDER), _port(variables)
    run = f"{variables.get('TORCHELASTIC_RUN_ID')} {port}"
    address = variables["MASTER_ADDR"] if nodes > 1 else network.own_loopback(run)
    init_method = _meeting(address, port)
    if variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        init_method = "env://"
    if folder:
        init_method = f"file://{folder}/world"
    return Environment(
        launcher="mpsl_dist" if folder else "torchrun",
        rank=rank,
        world=world,
        local_rank=local_rank,
        local_world=local_world,
        node=node,
        nodes=nodes,
        address=variables["MASTER_ADDR"],
        port=port,
        init_method=init_method,
        socket_interface=variables.get("TP_SOCKET_IFNAME") or None,
        folder=folder,
    )


def _in_slurm_step(variables: Mapping[str, str]) -> bool:
    step = variables.get("SLURM_STEP_ID", variables.get("SLURM_STEPID"))
    if step is None or "SLURM_PROCID" not in variables:
        return False
    return not (step.isdigit() and int(step) >= SLURM_SPECIAL_STEP)


def _from_slurm(variables: Mapping[str, str]) -> Environment | None:
    known = dict(variables)
    # The step's own shape is more exact than the job's; older releases set fewer names.
    for name, others in {
        "SLURM_STEP_ID": ("SLURM_STEPID",),
        "SLURM_STEP_NUM_TASKS": ("SLURM_NTASKS", "SLURM_NPROCS"),
        "SLURM_STEP_NODELIST": ("SLURM_JOB_NODELIST", "SLURM_NODELIST"),
        "SLURM_STEP_TASKS_PER_NODE": ("SLURM_TASKS_PER_NODE",),
        "SLURM_JOB_ID": ("SLURM_JOBID",),
    }.items():
        for other in others:
            if name not in known and other in known:
                known[name] = known[other]
    needed = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS")
    _require(known, needed, "srun")
    world = _number(known, "SLURM_STEP_NUM_TASKS", minimum=1)
    if world == 1:
        return None
    needed = ("SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE")
    _require(known, needed, "srun")
    return _from_step(known, world)


def _from_step(known: Mapping[str, str], world: int) -> Environment:
    rank, local_rank = _number(known, "SLURM_PROCID"), _number(known, "SLURM_LOCALID")
    node, hosts = _number(known, "SLURM_NODEID"), expand_hosts(known["SLURM_STEP_NODELIST"])
    tasks = expand_counts(known["SLURM_STEP_TASKS_PER_NODE"])
    if len(tasks) != len(hosts) or sum(tasks) != world:
        shape = ("SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NUM_TASKS")
        shown = ", ".join(f"{name}={known[name]}" for name in shape)
        raise LaunchError(f"{shown} contradict each other: start all ranks with one plain srun")
    _require_below(("SLURM_PROCID", rank), ("SLURM_STEP_NUM_TASKS", world))
    _require_below(("SLURM_NODEID", node), ("the nodes of SLURM_STEP_NODELIST", len(hosts)))
    _require_below(("SLURM_LOCALID", local_rank), ("SLURM_STEP_TASKS_PER_NODE", tasks[node]))
    address = known.get("MASTER_ADDR") or hosts[0]
    job, step = _number(known, "SLURM_JOB_ID"), _number(known, "SLURM_STEP_ID")
    port = _port(known) if known.get("MASTER_PORT") else slurm_port(job, step)
    alone = len(hosts) == 1 and not known.get("MASTER_ADDR")
    return Environment(
        launcher="slurm",
        rank=rank,
        world=world,
        local_rank=local_rank,
        local_world=tasks[node],
        node=node,
        nodes=len(hosts),
        address=address,
        port=port,
        init_method=_meeting(network.own_loopback(f"{job} {step}") if alone else address, port),
        socket_interface=known.get("TP_SOCKET_IFNAME") or None,
    )


def _meeting(address: str, port: int) -> str:
    return f"{MEETING}://[{address}]:{port}" if ":" in address else f"{MEETING}://{address}:{port}"


def slurm_port(job: int, step: int) -> int:
    """Return the port where a job step's ranks meet.

    Always even, so that the next one is the step's too. The first steps of jobs less than 5,000
    ids apart never share a port, nor do any of the first 61 steps of jobs less than 81 apart.
    ``MASTER_PORT`` overrides it.
    """
    return SLURM_PORTS.start + 2 * ((61 * job + step) % (len(SLURM_PORTS) // 2))


def expand_hosts(text: str) -> list[str]:
    """Return the hosts of Slurm's compressed list, such as ``node[01-03,07],gpu5``.

    Raises
    ------
    LaunchError
        If the text is no such list.
    """
    hosts: list[str] = []
    items = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text)
    if not items or ",".join(items) != text:
        raise LaunchError(f"'{text}' is no Slurm node list")
    for item in items:
        # re.split with a group alternates between plain text and the inside of brackets.
        parts = re.split(r"\[([^\]]*)\]", item)
        choices = [_expand_ranges(p, text) if i % 2 else [p] for i, p in enumerate(parts)]
        hosts += ["".join(choice) for choice in product(*choices)]
    return hosts


def _expand_ranges(ranges: str, text: str) -> list[str]:
    numbers: list[str] = []
    for entry in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", entry)
        if match is None:
            raise LaunchError(f"'{text}' is no Slurm node list: '{entry}' is no range of numbers")
        first, last = match[1], match[2] or match[1]
        if int(last) < int(first):
            raise LaunchError(f"'{text}' is no Slurm node list: '{entry}' runs backwards")
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers


def expand_counts(text: str) -> list[int]:
    """Return the numbers of Slurm's compressed list: ``2(x3),1`` is two, two, two, one.

    Raises
    ------
    LaunchError
        If the text is no such list.
    """
    counts: list[int] = []
    for entry in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", entry)
        if match is None:
            raise LaunchError(f"'{text}' is no Slurm list of task counts")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _refuse_contradiction(variables: Mapping[str, str], slurm: Environment) -> None:
    """Refuse ranks set by hand inside an srun if they are not Slurm's own."""
    for name, ours, theirs in (
        ("RANK", "SLURM_PROCID", slurm.rank),
        ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", slurm.world),
        ("LOCAL_RANK", "SLURM_LOCALID", slurm.local_rank),
    ):
        if name in variables and variables[name] != str(theirs):
            raise LaunchError(
                f"{name}={variables[name]} contradicts {ours}={theirs}, and TORCHELASTIC_RUN_ID "
                f"is not set: start with torchrun, or unset {name} and let srun number the ranks"
            )


def _require(variables: Mapping[str, str], names: Sequence[str], launcher: str) -> None:
    missing = [name for name in names if not variables.get(name)]
    if missing:
        present = [name for name in (*TORCHRUN_MARKS, "SLURM_PROCID") if variables.get(name)]
        raise LaunchError(
            f"{', '.join(missing)} not set, though {', '.join(present)} "
            f"{'is' if len(present) == 1 else 'are'}: start every process with {launcher}, "
            "or unset what is left over from an earlier run"
        )


def _require_below(lower: tuple[str, int], upper: tuple[str, int]) -> None:
    if lower[1] >= upper[1]:
        raise LaunchError(f"{lower[0]}={lower[1]} is not below {upper[0]}={upper[1]}")


def _number(variables: Mapping[str, str], name: str, minimum: int = 0) -> int:
    text = variables[name]
    if not text.isdecimal() or int(text) < minimum:
        raise LaunchError(f"{name}: expected a whole number from {minimum}, found '{text}'")
    return int(text)


def _port(variables: Mapping[str, str]) -> int:
    port = _number(variables, "MASTER_PORT", minimum=1)
    if port > 65535:
        raise LaunchError(f"MASTER_PORT: {port} is no port (1 to 65535)")
    return port
