"""The record: run manifests, the views over a run's tables, and the named queries (package data)."""
