"""What generates: one folder an engine, and what they have in common."""
