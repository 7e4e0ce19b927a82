"""Published figures to set beside our own, one JSON file a source; see `bench.reporting.tables.references`."""
