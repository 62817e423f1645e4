"""Runs passes over shards: what is due, in which process, and how a shard resumes."""
