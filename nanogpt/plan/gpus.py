"""GPUs by their data sheets, and what many of them in many machines are together.

In: names and numbers of GPUs, nodes and gigabits. Out: a `Cluster`. Refuses: a GPU that is not in the table, with those that are like it.
"""

import difflib
from dataclasses import dataclass

from nanogpt.errors import UserError

ETHERNET = 12.5e9  # bytes/s out of a node where nothing is known of its network: 100 gigabits


@dataclass(frozen=True)
class Gpu:
    """A processor by its data sheet: FLOP/s of dense bfloat16 (or float16 where there is none), bytes of memory, bytes/s of it, and bytes/s to the other GPUs
    of a node; `network`: bytes/s out of a node for each GPU in the vendor's own server, where there is one."""

    flops: float
    memory: float
    bandwidth: float
    link: float
    network: float | None = None


# Data sheets of NVIDIA and AMD, without sparsity; for GeForce the architectures' white papers, products added up in float32. `link` is NVLink or Infinity
# Fabric in both directions together, else PCIe. `network` is that of DGX-1 (4 x 100 gigabits for 8 GPUs), DGX A100 (8 x 200), DGX H100, H200 and B200 (8 x
# 400), by their data sheets.
GPUS = {
    "t4": Gpu(65e12, 16e9, 300e9, 32e9),
    "v100": Gpu(125e12, 32e9, 900e9, 300e9, 6.25e9),
    "a10": Gpu(125e12, 24e9, 600e9, 64e9),
    "a100": Gpu(312e12, 80e9, 2039e9, 600e9, 25e9),
    "l4": Gpu(121e12, 24e9, 300e9, 64e9),
    "l40s": Gpu(362e12, 48e9, 864e9, 64e9),
    "h100": Gpu(989e12, 80e9, 3350e9, 900e9, 50e9),
    "h200": Gpu(989e12, 141e9, 4800e9, 900e9, 50e9),
    "b200": Gpu(2250e12, 180e9, 8000e9, 1800e9, 50e9),
    "rtx3090": Gpu(71e12, 24e9, 936e9, 112.5e9),
    "rtx4090": Gpu(165e12, 24e9, 1008e9, 64e9),
    "rtx5090": Gpu(210e12, 32e9, 1792e9, 128e9),
    "mi250x": Gpu(191.5e12, 64e9, 1638e9, 400e9),  # half of it: PyTorch sees two
    "mi300x": Gpu(1307e12, 192e9, 5300e9, 896e9),
}


@dataclass(frozen=True)
class Cluster:
    """`nodes` machines of `per_node` devices of a kind each. Bytes/s go one way; None is what is not known."""

    name: str
    flops: float
    memory: float | None
    bandwidth: float | None = None
    link: float = ETHERNET  # from one device to the next within a node
    network: float = ETHERNET  # out of a node
    per_node: int = 1
    nodes: int = 1

    @property
    def devices(self) -> int:
        """How many there are in all."""
        return self.per_node * self.nodes

    def __str__(self) -> str:
        within = f"{self.per_node} x " * (self.devices > 1)
        return f"{self.nodes} x {within}{self.name}" if self.nodes > 1 else f"{within}{self.name}"


def cluster_of(gpu: str, per_node: int = 1, nodes: int = 1, gigabits: float | None = None) -> Cluster:
    """Machines with so many of a GPU each. Without `gigabits` per second out of each, they are as in the vendor's server, or 100.

    Errors: `UserError` for a GPU that is not in the table.
    """
    name = "".join(letter for letter in gpu.lower() if letter.isalnum())
    if name not in GPUS:
        near = difflib.get_close_matches(name, GPUS, n=3, cutoff=0.5)
        like = f" Did you mean {' or '.join(near)}?" if near else ""
        raise UserError(f"There is no GPU {gpu!r} in the table.{like}", f"Use one of: {', '.join(GPUS)}.")
    sheet = GPUS[name]
    usual = sheet.network * per_node if sheet.network else ETHERNET
    network = gigabits * 1e9 / 8 if gigabits is not None else usual
    return Cluster(name, sheet.flops, sheet.memory, sheet.bandwidth, sheet.link / 2, network, per_node, nodes)
