"""Healing: a pruned model learns from its dense model on some text, and keeps its shapes."""
