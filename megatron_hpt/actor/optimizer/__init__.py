"""The optimizer, its state in boxes, and where that rests."""
