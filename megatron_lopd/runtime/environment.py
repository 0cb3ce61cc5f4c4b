"""The environment variables of the processes that are started here: devices, threads, allocator, caches.

What the user has set stays. All of it has to be there before torch is imported, so this module imports none
but to count GPUs.
"""

from __future__ import annotations

import getpass
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from megatron_lopd.artifacts.user_cache import CACHE_VARIABLE, user_cache
from megatron_lopd.config import ParallelConfig
from megatron_lopd.errors import ConfigError
from megatron_lopd.runtime.display import say

# What tells a process that it is a rank, from torchrun or from runtime/launch.py.
RANK_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_NAME",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
RANK_PREFIX = "TORCHELASTIC_"

# Of a trainer alone: packed micro-batches of any length leave no holes in its memory. The memory that vLLM's
# all-reduce maps from one process into another must not move, which this lets it.
ALLOCATOR = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
OLD_ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"  # its name before torch 2.9, still read first
# Kernels start in the order they were launched in, so that a tensor or context parallel collective begins
# before the product that is to hide it. From Blackwell on the priorities of streams see to that, and one
# queue would only serialise (megatron/training/arguments.py of Megatron-Core 0.19 asks for the same).
ONE_QUEUE = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
BLACKWELL = 10  # its major compute capability

LOOPBACK = "127.0.0.1"  # rank 0's address where all ranks are on this machine

HIDDEN_GPUS = "LOPD_HIDDEN_GPUS"  # what `hide_gpus` took away


def set_for_training(parallel: ParallelConfig) -> None:
    """Add what a rank of a trainer wants to this process's, whoever started it. Before importing torch."""
    if OLD_ALLOCATOR not in os.environ:
        _add(ALLOCATOR)
    overlaps = parallel.tensor > 1 or parallel.context > 1
    if overlaps and not os.environ.keys() & ONE_QUEUE.keys() and _compute_capability() < BLACKWELL:
        _add(ONE_QUEUE)


def for_rank(rank: int, processes: int, port: int, environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` for one of `processes` ranks on this machine, as torchrun would set it."""
    return threads(processes) | {
        **showing_gpus(environment),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
    }


def for_engine(environment: Mapping[str, str]) -> dict[str, str]:
    """This process's `environment` for an engine that it starts: no rank, and no trainer's settings.

    The engine of a rank among several on its machine sees that rank's GPU alone, as its first; that of a
    process by itself sees all that the process does.
    """
    ours = ALLOCATOR | ONE_QUEUE
    kept = {
        name: value
        for name, value in environment.items()
        if name not in RANK_VARIABLES and not name.startswith(RANK_PREFIX) and ours.get(name) != value
    }
    if int(environment.get("LOCAL_WORLD_SIZE", environment.get("WORLD_SIZE", "1"))) > 1:
        own, gpus = int(environment["LOCAL_RANK"]), visible_gpus(environment)
        if gpus:
            kept["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[own : own + 1])
    return kept


def threads(processes: int) -> dict[str, str]:
    """Each of `processes` gets its share of this machine's cores."""
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}


def visible_gpus(environment: Mapping[str, str] = os.environ) -> list[str]:
    """What CUDA_VISIBLE_DEVICES names (numbers, GPU- or MIG- names), or numbers of all there are.

    Of a process that hides them, what it hides. Makes no CUDA context: torch counts by NVML, or asks the
    driver for the number alone.
    """
    named = environment.get(HIDDEN_GPUS, environment.get("CUDA_VISIBLE_DEVICES"))
    if named is None:
        import torch

        return [str(number) for number in range(torch.cuda.device_count())]
    gpus = [each.strip() for each in named.split(",")]
    ends = [at for at, each in enumerate(gpus) if each in ("", "-1")]  # CUDA looks no further than there
    return gpus[: ends[0]] if ends else gpus


def hide_gpus() -> None:
    """Have this process see no GPU: whatever it does, it takes none of a GPU's memory. Before CUDA starts.

    What it starts with `showing_gpus` sees them.
    """
    if gpus := visible_gpus():
        os.environ.update({HIDDEN_GPUS: ",".join(gpus), "CUDA_VISIBLE_DEVICES": ""})


def hides_gpus() -> bool:
    """Whether there are GPUs that this process does not see."""
    return HIDDEN_GPUS in os.environ


def showing_gpus(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` for a process that is to use the GPUs that this one may hide."""
    shown = {name: value for name, value in environment.items() if name != HIDDEN_GPUS}
    if HIDDEN_GPUS in environment:
        shown["CUDA_VISIBLE_DEVICES"] = environment[HIDDEN_GPUS]
    return shown


def show_gpus() -> None:
    """Undo `hide_gpus`, in a process that has inherited it."""
    os.environ.update(showing_gpus(os.environ))
    os.environ.pop(HIDDEN_GPUS, None)


def make_writable() -> None:
    """Give a process that has no name, or no home it can write, what libraries take for granted.

    Containers run under any uid. Triton, vLLM, transformers and matplotlib keep files below HOME, and
    torch's inductor asks for the user's name. What cannot be written is replaced by a folder of this uid's
    own, with a line that says so; processes started from here inherit that, and say nothing.

    Raises ConfigError where nothing can be written for a while, not even a temporary file.
    """
    try:
        temporary = tempfile.gettempdir()
    except FileNotFoundError as error:
        raise ConfigError(f"{error.strerror}: set TMPDIR to a directory that can be written") from None
    try:
        getpass.getuser()
    except (KeyError, OSError):  # KeyError before Python 3.13
        os.environ["USER"] = f"uid{os.getuid()}"
    home = os.path.expanduser("~")
    if not os.path.isabs(home) or not _is_writable(Path(home)):  # "~" where nobody knows one
        os.environ["HOME"] = home = _scratch("home", "HOME", home)
    for name, default in (
        ("TRITON_CACHE_DIR", f"{os.environ.get('TRITON_HOME', home)}/.triton/cache"),
        ("TORCHINDUCTOR_CACHE_DIR", f"{temporary}/torchinductor_{getpass.getuser()}"),
        (CACHE_VARIABLE, str(user_cache())),  # inherited: no process hashes again what another here has
    ):
        place = os.environ.get(name, default)
        if not _is_writable(Path(place)):
            os.environ[name] = _scratch(name.lower(), name, place)


def _add(settings: Mapping[str, str]) -> None:
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def _compute_capability() -> float:
    """Of the machine's first GPU; 0 where nobody knows. Asks the driver's tool: torch would start CUDA."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        return float(answer.split()[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return 0.0


def _is_writable(path: Path) -> bool:
    """Whether a file could be made in the directory, or the directory made."""
    while not os.path.lexists(path):  # False, too, where one may not look
        path = path.parent
    return path.is_dir() and os.access(path, os.W_OK | os.X_OK)


def _scratch(folder: str, variable: str, place: str) -> str:
    """A folder of this uid's own, and nobody else's, for `place`. Says so in a line."""
    root = Path(tempfile.gettempdir(), f"lopd-{os.getuid()}")
    try:
        root.mkdir(mode=0o700, exist_ok=True)
        # Another's, who may write what is read here?
        if root.is_symlink() or root.stat().st_uid != os.getuid():
            raise FileExistsError
        path = root / folder
        path.mkdir(exist_ok=True)
    except FileExistsError:  # what is there under that name, whoever's it is, cannot be used
        path = Path(tempfile.mkdtemp(prefix="lopd-"), folder)
        path.mkdir()
    if os.environ.get("RANK", "0") == "0":
        say(f"lopd: {variable}: {place} cannot be written: {path} is used instead", error=True)
    return str(path)
