"""The report of a run: `numbers` and `samples` read its tables, `charts` lays them out, `render` fills the template."""
