"""What a prune leaves behind to read."""
