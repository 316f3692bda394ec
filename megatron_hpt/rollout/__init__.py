"""The coordinator: it has prompts sampled and graded, and turns them into the batches that the trainer trains on."""
