"""One decoder layer: neutral weights, reading and writing modules."""
