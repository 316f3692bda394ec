"""Checking this project against numbers that the reference code produced (`tools/check_vectors.py`)."""
