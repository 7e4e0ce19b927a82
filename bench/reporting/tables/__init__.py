"""Records to tables: rows, statistics between them, text in every format."""
