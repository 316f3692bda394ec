"""Models and runs beside one another."""
