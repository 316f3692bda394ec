"""Generation: the engines, and the coordinator that turns prompts into batches."""
