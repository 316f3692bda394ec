"""A folder for an SGLang server's PYTHONPATH on the host: see its sitecustomize.py."""
