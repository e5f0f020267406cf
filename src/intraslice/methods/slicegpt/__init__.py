"""SliceGPT: the residual stream is rotated and sliced."""
