"""Allocation rules: how many linear weights each site may keep. Pure tensors; the table is in strategies.py."""
