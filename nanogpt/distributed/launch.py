"""Initialize the process group of a launch by torchrun."""

import os
import secrets
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from nanogpt.distributed.command import current_command, format_ranks, torchrun_command
from nanogpt.distributed.context import COLLECTIVE_TIMEOUT_HOURS, DistContext
from nanogpt.errors import UserError

# All processes have to start within this time.
INIT_TIMEOUT_SECONDS = 300.0


def init_distributed(device: str) -> DistContext:
    """Initialize the process group from torchrun's environment variables.

    Args:
        device: The `device` setting.

    Returns:
        The context of this process; that of a single process without torchrun.

    Raises:
        UserError: The launch cannot work, or the other processes cannot be reached.
    """
    environment = os.environ
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return DistContext()
    world_size = int(environment["WORLD_SIZE"])
    may_use_gpus = device in ("auto", "cuda") and torch.cuda.is_available()
    num_gpus = torch.cuda.device_count() if may_use_gpus else 0
    run_id = environment.get("TORCHELASTIC_RUN_ID", "")
    if run_id == "none":
        # torchrun's default is the same for all launches, so add the id of its process.
        run_id = f"none {os.getppid()}"
    context = DistContext(
        rank=int(environment["RANK"]),
        world_size=world_size,
        local_rank=int(environment.get("LOCAL_RANK", environment["RANK"])),
        local_world_size=int(environment.get("LOCAL_WORLD_SIZE", world_size)),
        backend="NCCL" if num_gpus or device == "cuda" else "gloo",
        run_id=run_id,
        is_restart=environment.get("TORCHELASTIC_RESTART_COUNT", "0") != "0",
    )
    if world_size == 1:
        return context
    if device == "cuda" and not num_gpus:
        context.fail_on_all_ranks(
            f"PyTorch {torch.__version__} finds no GPU for {world_size} processes ({context}).",
            f"Train on CPUs with gloo: {torchrun_command(world_size, device='cpu')}",
        )
    if num_gpus and context.local_world_size > num_gpus:
        context.fail_on_all_ranks(
            f"{context.local_world_size} processes ({context}) were launched on a node with "
            f"{num_gpus} GPUs (limit one process per GPU).",
            f"Launch one process per GPU: {torchrun_command(num_gpus)}",
        )
    _init_process_group(context, "cpu:gloo,cuda:nccl" if num_gpus else "gloo")
    return context


def _init_process_group(context: DistContext, backend: str) -> None:
    timeout = timedelta(seconds=INIT_TIMEOUT_SECONDS)
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        prefix = _agree_on_prefix(store, rank, world_size)
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(prefix, store),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(hours=COLLECTIVE_TIMEOUT_HOURS),
        )
    except (RuntimeError, ValueError) as error:
        raise _init_error(context, str(error)) from error


def _init_error(context: DistContext, reason: str) -> UserError:
    port = os.environ.get("MASTER_PORT", "")
    address = f"{os.environ.get('MASTER_ADDR', '')}:{port}"
    process = f"Rank {context.rank} of {context.world_size} ({context.backend})"
    if "EADDRINUSE" in reason or "in use" in reason:
        command = torchrun_command(context.world_size, port=int(port) + 1)
        return UserError(
            f"{process} cannot listen at {address}: the port is in use.",
            f"Choose another port: {command}",
        )
    first_line = reason.strip().split("\n")[0]
    return UserError(
        f"{process} could not connect to the other processes at {address} ({first_line[:200]}).",
        "Use an address of the first node that all nodes can reach, and a free port: "
        f"torchrun --nnodes {os.environ.get('GROUP_WORLD_SIZE', 2)} "
        f"--nproc-per-node {context.local_world_size} --rdzv-backend c10d "
        f"--rdzv-endpoint HOST:PORT {current_command()}",
    )


def _agree_on_prefix(store: dist.Store, rank: int, world_size: int) -> str:
    """Agree on a prefix of store keys that no earlier process group used.

    torchrun keeps its store when it restarts processes, with the addresses of the dead ones, and
    nodes of an elastic launch may disagree on the number of restarts. So each rank posts a nonce,
    and rank 0 replies to all nonces with its own, which becomes the prefix.
    """
    nonce = secrets.token_hex(8)
    if rank > 0:
        store.set(f"nonce/{rank}", nonce)
        store.wait([f"prefix/{nonce}"], timedelta(seconds=INIT_TIMEOUT_SECONDS))
        prefix = store.get(f"prefix/{nonce}").decode()
        store.set(f"{prefix}/{rank}", "joined")
        return prefix
    deadline = time.monotonic() + INIT_TIMEOUT_SECONDS
    while missing := [
        other for other in range(1, world_size) if not store.check([f"{nonce}/{other}"])
    ]:
        for other in missing:
            if store.check([f"nonce/{other}"]):
                store.set(f"prefix/{store.get(f'nonce/{other}').decode()}", nonce)
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"{format_ranks(missing)} did not start within {INIT_TIMEOUT_SECONDS:.0f} s"
            )
        time.sleep(0.01)
    return nonce
