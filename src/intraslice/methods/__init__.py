"""The pruning methods: each a room of its own, listed in registry.py."""
