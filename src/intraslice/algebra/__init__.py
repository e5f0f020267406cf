"""Pure tensor algebra: torch alone."""
