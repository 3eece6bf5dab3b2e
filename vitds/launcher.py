"""Which rank the environment makes of this process: a launcher's variables, checked. Imports no torch.

`deepspeed` and `torchrun` give each of their processes all of GROUP; engine/process.py makes them of Slurm's.
Variables that were left over from something else are no launcher: they make one rank, or one clear error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vitds.errors import ResourceError

GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
REMEDY = (
    f"A launcher (deepspeed, torchrun, srun) sets {', '.join(GROUP)} in each of its processes: start with "
    f"one, or, for a process of its own, unset them: `unset {' '.join(GROUP)}`"
)


@dataclass(frozen=True)
class Place:
    """One process among those of a launcher.

    Attributes:
        rank: 0..ranks-1.
        ranks: R.
        local_rank: its number on this machine, which is that of its GPU.
        local_ranks: how many of them share this machine; 1 where the launcher does not say.
        is_launched: whether a launcher is there at all.
    """

    rank: int = 0
    ranks: int = 1
    local_rank: int = 0
    local_ranks: int = 1
    is_launched: bool = False


def read_place(environment: Mapping[str, str]) -> Place:
    """This process's place; alone without RANK, and with a WORLD_SIZE of 1 or none.

    Then no other variable counts.

    Raises: ResourceError if RANK and WORLD_SIZE are not both there, or a number is none, or out of range.
    """
    given = {name for name in GROUP if environment.get(name)}  # an empty variable is as good as none
    ranks = whole_number(environment, "WORLD_SIZE", lowest=1) if "WORLD_SIZE" in given else None
    if "RANK" not in given:
        of_mpi = environment.get("OMPI_COMM_WORLD_SIZE", "")
        if of_mpi.isdigit() and int(of_mpi) > 1:
            raise ResourceError(f"mpirun started {of_mpi} processes, but sets no RANK. {REMEDY}")
        if ranks in (None, 1):
            return Place()
        raise ResourceError(f"WORLD_SIZE={ranks} is set, but no RANK. {REMEDY}")
    if ranks is None:
        raise ResourceError(f"RANK={environment['RANK']} is set, but no WORLD_SIZE. {REMEDY}")
    rank = whole_number(environment, "RANK", lowest=0)
    if rank >= ranks:
        raise ResourceError(f"RANK={rank} is not below WORLD_SIZE={ranks}. {REMEDY}")
    if ranks == 1:
        return Place(is_launched=True)
    if "LOCAL_RANK" not in given:
        raise ResourceError(f"RANK and WORLD_SIZE are set, but no LOCAL_RANK. {REMEDY}")
    local_rank = whole_number(environment, "LOCAL_RANK", lowest=0)
    counts = [name for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE") if environment.get(name)]
    local_ranks = whole_number(environment, counts[0], lowest=1) if counts else 1
    return Place(rank, ranks, local_rank, local_ranks, is_launched=True)


def read_meeting(environment: Mapping[str, str]) -> tuple[str, int]:
    """Address and port where the ranks meet.

    Raises: ResourceError if one is missing, or the port is none.
    """
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if missing:
        raise ResourceError(f"RANK and WORLD_SIZE are set, but no {' and no '.join(missing)}. {REMEDY}")
    port = whole_number(environment, "MASTER_PORT", lowest=1)
    if port > 65535:
        raise ResourceError(f"MASTER_PORT={port} is no port: 1 to 65535. {REMEDY}")
    return environment["MASTER_ADDR"], port


def whole_number(environment: Mapping[str, str], name: str, *, lowest: int, remedy: str = REMEDY) -> int:
    """The value of a variable that is there.

    Raises: ResourceError that names it, if it is no whole number from `lowest` on.
    """
    text = environment[name].strip()
    if not (text.isascii() and text.isdigit()) or int(text) < lowest:
        raise ResourceError(f"{name}={environment[name]} is no whole number from {lowest} on. {remedy}")
    return int(text)
