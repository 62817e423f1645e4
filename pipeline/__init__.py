"""The machine: files, processes and clusters. It does not know what a caption is for."""
