"""The sentence that the texts of small tests repeat."""

WORDS = "the quick brown fox jumps over the lazy dog and runs away from 3 bears; "
