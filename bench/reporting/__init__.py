"""Reporting: from records to tables and pictures."""
