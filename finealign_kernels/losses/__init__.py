"""Losses as rows of tables, and what assembles them from token log-probs."""
