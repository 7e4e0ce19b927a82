"""Starting processes: which world this one is part of, which devices there are, torch elastic over them, groups of them."""
