"""The report: one self-contained page about one or several runs, and a picture of their curves."""
