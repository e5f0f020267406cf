"""What a saved model is worth: perplexity and zero-shot accuracy."""
