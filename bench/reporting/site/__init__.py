"""A static site of a results folder: opens from disk, asks no network, and is the same bytes for the same records."""
