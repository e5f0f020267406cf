"""How many sequences go through all layers at once when only the states at the layer boundaries are kept. No torch."""

from __future__ import annotations


def boundary_states_bytes(num_layers: int, seqlen: int, hidden_size: int, itemsize: int) -> int:
    """Return the memory that the states at the layer boundaries of one sequence take."""
    return (num_layers + 2) * seqlen * hidden_size * itemsize


def chunk_size(boundary_bytes: int, states_bytes: int, batch: int) -> int:
    """Return how many sequences go through the layers, forth and back, before the layers are loaded again.

    Args:
        boundary_bytes: memory for the states at the layer boundaries.
        states_bytes: of one sequence.
        batch: sequences in one forward batch, the least that goes at once.
    """
    return max(batch, boundary_bytes // states_bytes // batch * batch)
