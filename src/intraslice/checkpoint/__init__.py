"""Checkpoints on disk: finding and reading dense ones tensor by tensor, writing pruned ones by shards."""
