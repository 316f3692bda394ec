"""Where the rows of data lie, and how they are read piece by piece."""
