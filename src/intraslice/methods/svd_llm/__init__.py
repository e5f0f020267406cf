"""SVD-LLM: each weight becomes two low-rank factors."""
