"""What a saved model is worth: perplexity, speed, memory."""
