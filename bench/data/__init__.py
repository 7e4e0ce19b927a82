"""The data plane: shards, their index, readers, batch transforms."""
