"""The methods, one file each; imported as ``bench.methods``. Nothing in ``bench`` imports them: the registry finds them."""
