"""The folder is the registry: one source a file, named by `source.kind`.

A source is a module with three names:

- `Config`: a frozen dataclass of its keys in `[source]`, declared with `pipeline.config.key`;
- `pieces(config) -> Iterator[Piece]`: what there is, in an order that growth does not change, listed without opening
  what need not be opened; a file whose number of samples only reading would tell has `stop=None`;
- `read(piece, config) -> Iterator[Raw]`: the samples of one piece in order, exactly `stop - start` of them where that
  is known. What cannot be read is a `Raw` with an error and no data, never an exception; an exception says that the
  machine failed (a disk, a network) and that the shard is to be tried again.

And, where a piece's `file` is named from a folder that may be moved:

- `place(file, config) -> str`: where it lies now.
"""
