"""The batch of a step: its rows, the ledger that keeps them, how they are packed, and what is estimated over all of them."""
