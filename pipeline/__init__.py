"""The machine: files, processes and clusters; it does not know what a caption is for."""
