"""What settings are read by, checked by and named in messages by. Knows no configuration."""
