"""Scores: of generated answers, and of the likelihood of given ones."""
