"""Captioning, scoring, filtering, export and training: one stage per file at the top of this package."""
