"""From a pruned checkpoint to what other runtimes load; one file and one row of `registry.EXPORTERS` each."""
