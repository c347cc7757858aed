"""Tensors that lie in parts in many processes, in a folder that all of them see: each writes its own, at once, and any number of processes reads them.

In: tensors by name, whole or sharded. Out: safetensors files by PyTorch's distributed checkpoints (DCP), in the storage format that is without pickles.
"""

import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor


def save_shards(folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Write the tensors of all processes, which all come here, and talk in a `group` of their own where others talk meanwhile. Errors: `OSError` in every
    process where one cannot write."""
    from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageWriter, save

    try:
        save(tensors, storage_writer=HuggingFaceStorageWriter(path=str(folder), save_distributed=True), process_group=group)
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise OSError(getattr(cause, "errno", None), f"{cause} (rank {min(error.failures)})") from error


def load_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill the tensors of all processes, each with its part of what was written, in whatever parts that was; or in one file for all.

    Errors: `ValueError` where something is missing or damaged.
    """
    from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, load

    alone = not any(hasattr(tensor, "full_tensor") for tensor in tensors.values())
    try:
        with warnings.catch_warnings():  # it says what `alone` says
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            load(tensors, storage_reader=HuggingFaceStorageReader(path=str(folder)), no_dist=alone)
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise ValueError(f"{cause} (rank {min(error.failures)})") from error


def shapes(folder: Path) -> dict[str, list[int]]:
    """The names and shapes of the tensors in a folder. Errors: `ValueError` where a file is damaged."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    try:
        found = HuggingFaceStorageReader(path=str(folder)).read_metadata().state_dict_metadata
    except Exception as error:  # the readers below have errors of many kinds
        raise ValueError(f"its files cannot be read: {error}") from error
    return {name: list(about.size) for name, about in found.items()}  # type: ignore[union-attr]


def read_whole(folder: Path) -> dict[str, Tensor]:
    """All tensors in a folder, whole, in this process alone."""
    tensors = {name: torch.empty(shape) for name, shape in shapes(folder).items()}
    load_shards(folder, tensors)
    return tensors
