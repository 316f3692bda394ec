"""From files of problems as others publish them to the project's parquet: read, map, check, write, and say what was found."""
