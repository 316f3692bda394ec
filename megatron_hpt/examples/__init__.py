"""Inputs of the shipped recipes: generated data, a tiny model, and the small pretrained one."""
