"""Can these records be believed: verify, run again, stamp, submit."""
