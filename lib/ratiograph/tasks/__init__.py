"""What a run trains: a student (`distillation`), a teacher, a ratio estimator, a classifier.

Imports every room below. Read first: `distillation`, whose ``step`` is the algorithm, then `critics`. `student_files`
reads a finished student back.
"""
