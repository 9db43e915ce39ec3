"""Observers of a run: the store's columns, the export, the progress bar, the run record."""
