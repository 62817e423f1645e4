"""The report of a run: `numbers` and `samples` ask its tables, the others lay out the answers, `page` is the whole."""
