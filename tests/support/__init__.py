"""What several test files need: small models, one way to prune them, samples, and clocks that do not tick."""
