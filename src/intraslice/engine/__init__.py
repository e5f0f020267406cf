"""The prune itself: streams a checkpoint layer by layer through the pure code."""
