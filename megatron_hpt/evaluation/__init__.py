"""Evaluation of a model: sample the problems of test sets, grade the samples, keep them, and compute accuracies."""
