"""Which CUDA kernel multiplies two matrices, and in tiles of which size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Plan", "popcount_plan"]

ROW_BYTES = 128  # of a tile of the tensor-core kernels
POPCOUNT_WARPS = 8
# Rows and columns that a thread of the popcount kernels owns, by how many rows there are: (least rows, TM, TN).
POPCOUNT_TILES = ((256, 4, 4), (33, 2, 2), (0, 1, 1))


@dataclass(frozen=True)
class Plan:
    """Which kernel multiplies two matrices, and its tile.

    Args:
        kernel: "popcount_gemm", "mma_gemm" or "wgmma_gemm".
        tile: its macros: TM, TN; or BM, BN, WM, WN, STAGES; or BM, BN, STAGES.
    """

    kernel: str
    tile: Mapping[str, int]

    @property
    def rows(self) -> int:
        """Rows of a block's tile."""
        return self.tile["BM"] if "BM" in self.tile else POPCOUNT_WARPS * self.tile["TM"]

    @property
    def columns(self) -> int:
        """Columns of a block's tile."""
        return self.tile["BN"] if "BN" in self.tile else 32 * self.tile["TN"]

    @property
    def threads(self) -> int:
        """Threads of a block."""
        if self.kernel == "mma_gemm":
            return self.rows // self.tile["WM"] * (self.columns // self.tile["WN"]) * 32
        return self.rows // 64 * 128 if self.kernel == "wgmma_gemm" else POPCOUNT_WARPS * 32

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        return (self.rows + self.columns) * ROW_BYTES * self.tile["STAGES"] if "STAGES" in self.tile else 0


def popcount_plan(rows: int, columns: int) -> Plan:
    """Return the tile of the popcount kernels: small where few rows or columns would leave most of a large one idle."""
    tm, tn = next((tm, tn) for least, tm, tn in POPCOUNT_TILES if rows >= least)
    return Plan("popcount_gemm", {"TM": tm, "TN": tn if columns > 32 else 1})
