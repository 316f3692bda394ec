"""This folder is on the PYTHONPATH of SGLang servers on the host, for its sitecustomize.py."""
