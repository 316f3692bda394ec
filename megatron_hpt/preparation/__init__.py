"""From files of problems as others publish them to the project's parquet: they are read, mapped, checked and written."""
