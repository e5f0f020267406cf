"""Methods that make attention heads and FFN channels fewer or narrower, composed of named parts."""
