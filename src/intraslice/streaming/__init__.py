"""A dense model of which one layer is in memory at a time."""
