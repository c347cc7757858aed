"""Many processes as one: which of them this is, what all of them agree on, and how their numbers become one.

In: what torchrun put into the environment. Out: `Ranks`, of which the one of a single process does nothing and imports nothing.
Refuses: launches that cannot work, with the ranks, the backend and the command that does.

Numbers and settings travel as tensors and JSON in the memory of the processors, over gloo, whatever the gradients take: no pickles, and no waiting for a GPU.
"""

import json
import os
import re
import secrets
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nanogpt.errors import UserError

JOIN_SECONDS = 300.0  # within which all processes have to begin,
WAIT_HOURS = 24.0  # and in which none may be waited for longer: the first prepares the text, while the others wait. A process that ends is noticed at once
LOST = ("gloo", "Connection closed", "Connection reset", "NCCL", "Broken pipe")  # what PyTorch's errors say when another process is gone
Value = TypeVar("Value")

_beside: dict[Any, Any] = {}  # the line beside the group of all, which stays open as long as that does


@dataclass(frozen=True)
class Ranks:
    """The processes that train one model: this one's number among them, and how many they are, in all and on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    backend: str = ""
    launch: str = ""  # what names this launch, also after its processes were started again
    restarted: bool = False
    sharded: bool = False  # each holds a part of every parameter, instead of all

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all: it prints, writes and decides."""
        return self.rank == 0

    def rows(self, batch_size: int) -> range:
        """The rows of a batch that this process computes. Errors: `UserError` where the processes cannot share it evenly."""
        if batch_size % self.size:
            fitting = -(-batch_size // self.size) * self.size
            below = next(n for n in range(self.size, 0, -1) if batch_size % n == 0)
            self.refuse(
                f"A batch of {batch_size} windows cannot be shared evenly by {self.size} processes ({self}).",
                f"Use a batch that can: {command(self.size, batch_size=fitting)}\nOr as many processes as can: {command(below)}",
            )
        share = batch_size // self.size
        return range(self.rank * share, (self.rank + 1) * share)

    def sum(self, *numbers: float) -> list[float]:
        """The sums of these numbers over all processes, in double precision; they are the same, bit for bit, in each."""
        if self.size == 1:
            return list(numbers)
        summed = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(summed)
        return summed.tolist()

    def any(self, *flags: bool) -> list[bool]:
        """Of each flag, whether any process has raised it."""
        return [raised > 0 for raised in self.sum(*flags)]

    def numbers_of_first(self, *numbers: float) -> list[float]:
        """The numbers that the first process has, in every one."""
        return self.sum(*(number if self.is_first else 0.0 for number in numbers))

    def of_first(self, value: Any) -> Any:
        """What the first process has, as JSON has it, in every one."""
        return value if self.size == 1 else self._sent(value, 0)

    def of_all(self, value: Any) -> list[Any]:
        """What each process has, by rank."""
        return [value] if self.size == 1 else [self._sent(value, rank) for rank in range(self.size)]

    def _sent(self, value: Any, source: int) -> Any:
        content = bytearray(json.dumps(value).encode()) if self.rank == source else bytearray()
        length = torch.tensor(len(content))
        dist.broadcast(length, source)
        letters = torch.frombuffer(content, dtype=torch.uint8) if self.rank == source else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(letters, source)
        return json.loads(letters.numpy().tobytes())

    def decided(self, decide: Callable[[], Value]) -> Value | None:
        """What `decide` gives in the first process, and None in the others, which wait for it; when it fails there, they end, for that one says why."""
        if self.size == 1:
            return decide()
        value = None
        try:
            value = decide() if self.is_first else None
        except BaseException:
            self.of_first(False)
            raise
        if not self.of_first(True):
            raise SystemExit(2)
        return value

    def in_turn(self, work: Callable[[], Value]) -> Value:
        """What `work` gives, which the first process of each machine does before the others there: they find its files."""
        value = work() if self.local_rank == 0 else None
        self.sum(0)
        return value if value is not None else work()

    def refuse(self, what: str, fix: str) -> None:
        """Stop for a reason that all processes see: the first says it, and the others end."""
        raise UserError(what, fix) if self.is_first else SystemExit(2)

    def require_same(self, mine: dict[str, Any]) -> None:
        """Errors: `UserError` where the processes were not all begun with the same versions and settings, with a table of who has which."""
        if self.size == 1:
            return
        of_all = self.of_all(mine)
        rows = []
        for name in sorted({name for one in of_all for name in one}):
            ranks_with: dict[str, list[int]] = {}
            for rank, one in enumerate(of_all):
                ranks_with.setdefault(json.dumps(one.get(name)), []).append(rank)
            if len(ranks_with) > 1:
                rows += [f"  {name:16} {value}: {_ranks(ranks)}" for value, ranks in ranks_with.items()]
        if rows:
            what = "The processes were not begun alike:\n" + "\n".join(rows)
            self.refuse(what, f"Run the same command, with the same nanogpt, on every machine: {command(self.size)}")

    def fill(self, target: Tensor, whole: Tensor | None) -> None:
        """Put `whole`, which only the first process needs to have, into a tensor of every process, or into its part of a sharded one."""
        if self.size == 1:
            assert whole is not None
            target.copy_(whole)
        elif not self.is_plain(target):
            from torch.distributed.tensor import distribute_tensor

            whole = torch.empty(target.shape, dtype=target.dtype) if whole is None else whole
            target.copy_(distribute_tensor(whole.to(target.device), target.device_mesh, target.placements))  # type: ignore[attr-defined]
        else:
            if self.is_first:
                assert whole is not None
                target.copy_(whole)
            dist.broadcast(target, 0)

    def whole(self, tensor: Tensor) -> Tensor:
        """All of a tensor, of which each process may have a part; all of them have to ask for it."""
        return tensor if self.is_plain(tensor) else tensor.full_tensor()  # type: ignore[attr-defined]

    def beside(self) -> dist.ProcessGroup | None:
        """A line of its own between the processes, for what a thread has to say while others talk; all have to ask for it, and get the same each time."""
        if dist.group.WORLD not in _beside:
            _beside.clear()  # of a group that is gone
            _beside[dist.group.WORLD] = dist.new_group(backend="gloo", timeout=timedelta(hours=WAIT_HOURS))
        return _beside[dist.group.WORLD]

    @staticmethod
    def is_plain(tensor: Tensor) -> bool:
        """Whether a tensor is all here."""
        return not hasattr(tensor, "full_tensor")

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Say in words, and only once for all that follows from it, that another process is gone; at the end take leave."""
        try:
            yield
            self.sum(0)  # who leaves while others still read what it sent would break them off
        except RuntimeError as error:
            if self.size == 1 or not (isinstance(error, dist.DistError) or any(sign in str(error) for sign in LOST)):
                raise
            lines = str(error).strip().split("\n")
            raise UserError(
                f"Rank {self.rank} of {self.size} ({self.backend}) has lost the others: one of them ended, and says why in its own output ({lines[0][:200]}).",
                f"Go on from the last save: {command(self.size, resume=True)}",
            ) from error
        finally:
            if self.size > 1:
                dist.destroy_process_group()

    def __str__(self) -> str:
        return f"ranks 0 to {self.size - 1}, {self.backend}" if self.size > 1 else "one process"


def join(device: str) -> Ranks:
    """Meet the other processes that torchrun began, or none. `device` is the setting. Errors: `UserError` for a launch that cannot work."""
    environment = os.environ.get
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Ranks()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    gpus = torch.cuda.device_count() if device in ("auto", "cuda") and torch.cuda.is_available() else 0
    local_size = int(environment("LOCAL_WORLD_SIZE", size))
    launch = environment("TORCHELASTIC_RUN_ID", "")
    ranks = Ranks(
        rank, size, int(environment("LOCAL_RANK", rank)), local_size, "NCCL" if gpus or device == "cuda" else "gloo",
        f"{launch} {os.getppid()}" if launch == "none" else launch,  # torchrun's name for a launch that it was given no name for
        environment("TORCHELASTIC_RESTART_COUNT", "0") != "0",
    )  # fmt: skip
    if size == 1:
        return ranks
    if device == "cuda" and not gpus:
        what = f"{size} processes ({ranks}) were to share GPUs, but PyTorch {torch.__version__} sees none on this machine."
        ranks.refuse(what, f"On its processors, with gloo: {command(size, device='cpu')}")
    if gpus and local_size > gpus:
        ranks.refuse(f"{local_size} processes on this machine ({ranks}) have {gpus} GPUs: each needs one of its own.", command(gpus))
    _meet(ranks, f"{environment('MASTER_ADDR', '')}:{environment('MASTER_PORT', '')}", gpus > 0)
    return ranks


def _meet(ranks: Ranks, where: str, gpus: bool) -> None:
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=JOIN_SECONDS)))
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        store = dist.PrefixStore(_attempt(store, rank, size), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(hours=WAIT_HOURS))
    except (RuntimeError, ValueError) as error:
        why = str(error).strip().split("\n")[0][:200]
        launch = f"torchrun --nnodes {os.environ.get('GROUP_WORLD_SIZE', 2)} --nproc-per-node {ranks.local_size} --rdzv-backend c10d"
        if "EADDRINUSE" in str(error) or "in use" in str(error):
            fix = f"Choose another port: {command(ranks.size, port=int(os.environ['MASTER_PORT']) + 1)}"
            raise UserError(f"Rank {ranks.rank} of {ranks.size} ({ranks.backend}) cannot listen at {where}: the port is taken.", fix) from error
        raise UserError(
            f"Rank {ranks.rank} of {ranks.size} ({ranks.backend}) did not reach the others at {where} ({why}).",
            f"Name an address of the first machine that all can reach, and a free port: {launch} --rdzv-endpoint HOST:PORT {_program()}",
        ) from error


def _attempt(store: dist.Store, rank: int, size: int) -> str:
    """A name for this meeting that no earlier one had: torchrun keeps its store when it begins processes again, with the addresses of those that are dead, and
    machines that come and go need not agree on how often that was. So each process asks with a new word, and the first answers all with one."""
    word = secrets.token_hex(8)
    if rank > 0:
        store.set(f"asking/{rank}", word)
        store.wait([f"answer/{word}"], timedelta(seconds=JOIN_SECONDS))
        name = store.get(f"answer/{word}").decode()
        store.set(f"{name}/{rank}", "here")
        return name
    deadline = time.monotonic() + JOIN_SECONDS
    while missing := [other for other in range(1, size) if not store.check([f"{word}/{other}"])]:
        for other in missing:
            if store.check([f"asking/{other}"]):
                store.set(f"answer/{store.get(f'asking/{other}').decode()}", word)
        if time.monotonic() > deadline:
            raise RuntimeError(f"no sign of {_ranks(missing)} in {JOIN_SECONDS:.0f} s")
        time.sleep(0.01)
    return word


def command(processes: int, port: int | None = None, **settings: Any) -> str:
    """The command that began this program, with so many processes and some settings changed."""
    words = _program()
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        words = re.sub(rf" {flag}(?!-)(=|\s+)?(?(1)\S+)", "", words) if value is not True else words.replace(f" {flag}", "")
        words += f" {flag}" + ("" if value is True else f" {value}")
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    nnodes = f"--nnodes {nodes} " if nodes > 1 and processes % nodes == 0 else ""
    per_node = processes // nodes if nnodes else processes
    return f"torchrun {nnodes}--nproc-per-node {per_node} {f'--master-port {port} ' if port else ''}{words}"


def _program() -> str:
    own = os.path.basename(sys.argv[0]) in ("__main__.py", "nanogpt")
    return ("-m nanogpt " if own else f"{shlex.quote(sys.argv[0])} ") + shlex.join(sys.argv[1:])


def _ranks(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
