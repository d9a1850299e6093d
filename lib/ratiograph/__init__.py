"""ratiograph: diffusion distillation as a declarative graph of density-ratio components.

The rooms, from the lowest floor up; each imports from lower floors alone, and `lint-imports` keeps it so:

1. `core` (values and contracts); on it `config` (all that knows gin)
2. `algebra` (the field and its parts), `data` (what reads samples)
3. `networks` (denoisers, students, ratios, samplers, weights)
4. `training` (a run: loop, optimisers, processes, checkpoints)
5. `tasks` (what a run trains)
6. `evaluation` (what judges samples), `reports` (what people look at)
"""

__version__ = "0.1.0"
