"""Who runs where, and keeping it running."""
