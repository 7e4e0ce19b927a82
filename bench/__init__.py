"""A benchmark harness for class activation maps in facial expression recognition."""

__version__ = "0.2.0"
