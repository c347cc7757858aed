"""Data sheets of GPUs, and clusters of them."""

import difflib
from dataclasses import dataclass

from nanogpt.errors import UserError

# Assumed bytes/s out of a node with an unknown network: 100 Gbit/s Ethernet.
DEFAULT_NETWORK_BANDWIDTH = 12.5e9


@dataclass(frozen=True)
class GpuSpec:
    """The data sheet of a GPU.

    Attributes:
        peak_flops: Dense bfloat16 FLOP/s (float16 where there is no bfloat16).
        memory: Bytes of memory.
        memory_bandwidth: Bytes/s of the memory.
        link_bandwidth: Bytes/s to the other GPUs of a node, both directions together.
        network_bandwidth: Bytes/s out of a node per GPU in the vendor's own server, if any.
    """

    peak_flops: float
    memory: float
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float | None = None


# Sources: data sheets of NVIDIA and AMD, without sparsity; for GeForce the architectures' white
# papers, with float32 accumulation. Links are NVLink or Infinity Fabric, else PCIe. Networks are
# those of DGX-1 (4 x 100 Gbit/s for 8 GPUs), DGX A100 (8 x 200), and DGX H100, H200 and B200
# (8 x 400).
GPU_SPECS = {
    "t4": GpuSpec(65e12, 16e9, 300e9, 32e9),
    "v100": GpuSpec(125e12, 32e9, 900e9, 300e9, 6.25e9),
    "a10": GpuSpec(125e12, 24e9, 600e9, 64e9),
    "a100": GpuSpec(312e12, 80e9, 2039e9, 600e9, 25e9),
    "l4": GpuSpec(121e12, 24e9, 300e9, 64e9),
    "l40s": GpuSpec(362e12, 48e9, 864e9, 64e9),
    "h100": GpuSpec(989e12, 80e9, 3350e9, 900e9, 50e9),
    "h200": GpuSpec(989e12, 141e9, 4800e9, 900e9, 50e9),
    "b200": GpuSpec(2250e12, 180e9, 8000e9, 1800e9, 50e9),
    "rtx3090": GpuSpec(71e12, 24e9, 936e9, 112.5e9),
    "rtx4090": GpuSpec(165e12, 24e9, 1008e9, 64e9),
    "rtx5090": GpuSpec(210e12, 32e9, 1792e9, 128e9),
    # One of the two halves, which PyTorch sees as two GPUs.
    "mi250x": GpuSpec(191.5e12, 64e9, 1638e9, 400e9),
    "mi300x": GpuSpec(1307e12, 192e9, 5300e9, 896e9),
}


@dataclass(frozen=True)
class Cluster:
    """Nodes with equal devices.

    Attributes:
        name: Name of the device.
        peak_flops: FLOP/s of a device.
        memory: Bytes of memory of a device, or None if unknown.
        memory_bandwidth: Bytes/s of a device's memory, or None if unknown.
        link_bandwidth: Bytes/s from one device to another within a node, one direction.
        network_bandwidth: Bytes/s out of a node, one direction.
        devices_per_node: Number of devices in a node.
        nodes: Number of nodes.
    """

    name: str
    peak_flops: float
    memory: float | None
    memory_bandwidth: float | None = None
    link_bandwidth: float = DEFAULT_NETWORK_BANDWIDTH
    network_bandwidth: float = DEFAULT_NETWORK_BANDWIDTH
    devices_per_node: int = 1
    nodes: int = 1

    @property
    def num_devices(self) -> int:
        """Number of devices in all nodes."""
        return self.devices_per_node * self.nodes

    def __str__(self) -> str:
        node = f"{self.devices_per_node} x {self.name}" if self.num_devices > 1 else self.name
        return f"{self.nodes} x {node}" if self.nodes > 1 else node


def make_cluster(
    gpu: str, per_node: int = 1, nodes: int = 1, gigabits: float | None = None
) -> Cluster:
    """Return a cluster of GPUs.

    Args:
        gpu: Name of the GPU; case, spaces and hyphens do not matter.
        per_node: GPUs in each node.
        nodes: Number of nodes.
        gigabits: Gbit/s out of each node; by default as in the vendor's server, or 100.

    Raises:
        UserError: The table has no such GPU.
    """
    name = "".join(char for char in gpu.lower() if char.isalnum())
    if name not in GPU_SPECS:
        matches = difflib.get_close_matches(name, GPU_SPECS, n=3, cutoff=0.5)
        suggestion = f" Did you mean {' or '.join(matches)}?" if matches else ""
        raise UserError(
            f"There is no GPU {gpu!r} in the table.{suggestion}",
            f"Use one of: {', '.join(GPU_SPECS)}.",
        )
    spec = GPU_SPECS[name]
    network_bandwidth = DEFAULT_NETWORK_BANDWIDTH
    if gigabits is not None:
        network_bandwidth = gigabits * 1e9 / 8
    elif spec.network_bandwidth:
        network_bandwidth = spec.network_bandwidth * per_node
    return Cluster(
        name=name,
        peak_flops=spec.peak_flops,
        memory=spec.memory,
        memory_bandwidth=spec.memory_bandwidth,
        link_bandwidth=spec.link_bandwidth / 2,
        network_bandwidth=network_bandwidth,
        devices_per_node=per_node,
        nodes=nodes,
    )
