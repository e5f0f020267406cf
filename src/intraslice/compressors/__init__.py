"""Local compression: from second moments of one block to an edit of its weights. Pure tensors."""
