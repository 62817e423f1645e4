"""Image corpora, one kind a file: the directory is the registry, and `source.kind` is a file's name.

A source is a module with four names:

- `Config`: a frozen dataclass of its keys in `[source]`, declared with `pipeline.sections.key`;
- `claims(path: str) -> bool`: True when a path or URL given to `recap init --source` is of this kind. It looks at
  names, not into files. `init` asks `folder`, `webdataset` and `parquet` after all others, and takes the first;
- `pieces(config) -> Iterator[Piece]`: the corpus in an order that growth does not change, listed without opening
  files that need not be opened; a file whose number of samples only reading would show has `stop=None`;
- `read(piece, config) -> Iterator[Raw]`: the samples of one piece in order, exactly `stop - start` of them where that
  is known. A sample that cannot be read is a `Raw` with an error and no data, never an exception; an exception means
  that the machine failed (a disk, a network) and that the shard is to be retried.

A source with such files may also have `count(piece, config) -> int | None`: the number of samples in one, or None where
only reading all of it would show; `recap try` and `recap estimate` draw from what it counts.

A source whose pieces are named relative to a directory that may be moved, or whose images stay where they are, also has

- `list_statuses(config) -> Iterator[FileStatus]`: the files as they are now, for `recap plan` to find those that were
  edited;
- `read_texts(piece, config) -> Raw`: the sample of a piece of one file, without its bytes;
- `place(file, config) -> str`: the present path of a piece's `file`;
- `is_in_place(piece, config) -> bool`: True when the images of a piece are files, or ranges of a file, that later
  stages read themselves; all others are copied into the run.
"""
