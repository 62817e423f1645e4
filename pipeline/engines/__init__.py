"""The folder is the registry: one engine a file, named by `engines.NAME.kind`.

An engine is a module with two names: `Config`, a frozen dataclass of its keys in `[engines.NAME]`, declared with
`pipeline.config.key`; and `open(config) -> Engine`, which loads the model (see pipeline/engine.py).
"""
