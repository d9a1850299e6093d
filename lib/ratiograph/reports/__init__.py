"""Reports and exports: the page of a run, comparisons of runs, pictures of a graph and of samples, exported students.

Imports every room below, and not `evaluation`: reports read files. Read first: `run_report` and `comparison` (pages),
`charts` (with `axes`) and `page` (parts of a page); `export` writes a student as a pipeline, a LoRA or a folder.
"""
