"""One sum of every kind over a few tokens, measured in one process or in one of two."""

from __future__ import annotations

import torch
import torch.distributed
from safetensors.torch import save_file

from intraslice.algebra.statistics import Statistics

CPU = torch.device("cpu")
N, C, D = 40, 6, 3


def inputs_of(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(N, C, generator=torch.Generator().manual_seed(2)).to(dtype)


def measured(
    part: slice, data: torch.dtype = torch.float64, sums: torch.dtype = torch.float64, batch: int = 7
) -> Statistics:
    """Return one sum of every kind over some of the N tokens; each token is a row of its own."""
    inputs = inputs_of(data)
    statistics = Statistics(CPU, sums)
    moment, cross = statistics.second_moment("moment", C), statistics.second_moment("cross", C, D)
    blocks, total = statistics.block_second_moment("blocks", 2, C // 2), statistics.sum("total", C)
    tokens, rows = statistics.number("tokens"), statistics.rows("rows", N, C)
    for start in range(part.start, part.stop, batch):
        x = inputs[start : min(start + batch, part.stop)]
        moment.update(x)
        cross.update(x, x[:, :D])
        blocks.update(x)
        total.update(x.sum(0, dtype=sums))
        tokens.update(len(x))
        rows.write(slice(start, start + len(x)), x)
    return statistics


def reduce_in_process(rank: int, folder: str) -> None:
    """Measure the tokens of one of two processes, add up over both, and save the totals as RANK.safetensors.

    It stands in a module that a new process can import: the test files themselves cannot be imported by name.
    """
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    statistics = measured((slice(0, 13), slice(13, N))[rank])
    statistics.reduce()
    save_file(statistics.finish(), f"{folder}/{rank}.safetensors")
    torch.distributed.destroy_process_group()
