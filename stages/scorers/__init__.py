"""The folder is the registry: one scorer a file, named by `score.NAME.kind`."""
