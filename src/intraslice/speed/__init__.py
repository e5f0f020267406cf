"""How fast models and layers are."""
