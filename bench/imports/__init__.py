"""Reads what others published into records."""
