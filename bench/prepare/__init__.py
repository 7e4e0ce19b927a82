"""From a download to shards: checks, journal, workers, pictures, alignment, landmarks, splits."""
