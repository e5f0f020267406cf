"""Strings, files and flags become a checked recipe; nothing here imports torch."""
