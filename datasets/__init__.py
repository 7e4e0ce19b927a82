"""The datasets, one file each; imported as ``bench.datasets``. Nothing in ``bench`` imports them: the registry finds them."""
