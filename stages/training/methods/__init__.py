"""Training methods: one per file, named by `train.method`."""
