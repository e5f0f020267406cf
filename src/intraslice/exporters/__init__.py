"""From a pruned checkpoint to what other runtimes load; one file a target."""
