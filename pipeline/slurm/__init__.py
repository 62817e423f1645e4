"""Runs as Slurm array jobs: scripts, submission, and the state of jobs."""
