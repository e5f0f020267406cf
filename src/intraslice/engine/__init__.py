"""Runs the stages of a prune over the layers of a checkpoint; knows no method by name."""
