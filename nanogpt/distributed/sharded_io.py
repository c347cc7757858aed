"""Save and load sharded tensors with PyTorch's distributed checkpoints (DCP), without pickle.

All ranks write their shards at once, as safetensors files in a shared folder. Any number of
processes can load them.
"""

import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor


def dcp_save(
    folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None = None
) -> None:
    """Write full or sharded tensors to a folder; all ranks have to call this.

    Args:
        folder: A folder that all ranks share.
        tensors: Tensors by name.
        group: The process group to use if another thread uses the default one.

    Raises:
        OSError: A rank cannot write; raised on every rank.
    """
    from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageWriter, save

    writer = HuggingFaceStorageWriter(path=str(folder), save_distributed=True)
    try:
        save(tensors, storage_writer=writer, process_group=group)
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        message = f"{cause} (rank {min(error.failures)})"
        raise OSError(getattr(cause, "errno", None), message) from error


def dcp_load(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill full or sharded tensors in place; the saved sharding may differ.

    All ranks have to call this if a tensor is sharded.

    Raises:
        ValueError: A tensor is missing or a file is corrupt.
    """
    from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, load

    no_dist = not any(hasattr(tensor, "full_tensor") for tensor in tensors.values())
    reader = HuggingFaceStorageReader(path=str(folder))
    try:
        with warnings.catch_warnings():
            # PyTorch warns about a single process even though `no_dist` says so.
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            load(tensors, storage_reader=reader, no_dist=no_dist)
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise ValueError(f"{cause} (rank {min(error.failures)})") from error


def tensor_shapes(folder: Path) -> dict[str, list[int]]:
    """Return the shapes of the tensors in a folder by name.

    Raises:
        ValueError: A file is corrupt.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    try:
        metadata = HuggingFaceStorageReader(path=str(folder)).read_metadata().state_dict_metadata
    except Exception as error:  # PyTorch does not document which errors its readers raise
        raise ValueError(f"its files cannot be read: {error}") from error
    return {name: list(entry.size) for name, entry in metadata.items()}  # type: ignore[union-attr]


def load_full_state(folder: Path) -> dict[str, Tensor]:
    """Return all tensors in a folder, each complete, in this process alone."""
    tensors = {name: torch.empty(shape) for name, shape in tensor_shapes(folder).items()}
    dcp_load(folder, tensors)
    return tensors
