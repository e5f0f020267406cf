"""What loads and runs a pruned checkpoint."""
