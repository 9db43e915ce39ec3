"""What watches a run: its progress and its record."""
