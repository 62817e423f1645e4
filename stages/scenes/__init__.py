"""The scenes world's own tools: its caption grammar, simulated teachers and tiny models."""
