"""What people look at: the page of a run, comparisons of runs, pictures of a graph and of samples, exports.

Imports every room below, and not `evaluation`: reports read files. Read first: `run_report`, then `charts` and
`comparison`; `export` makes a pipeline of a student.
"""
