"""Pictures of maps: single pictures, galleries, contact sheets."""
