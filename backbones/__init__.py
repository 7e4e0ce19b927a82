"""The backbones, one file a family; imported as ``bench.backbones``. Nothing in ``bench`` imports them: the registry finds them."""
