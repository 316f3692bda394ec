"""What a person sees of a run: metrics, the live display, the report."""
