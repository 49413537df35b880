"""Do the scores of a small PRM mean something? A study on real data with a real backbone.

    python -m benchmarks.study train --all          # hours; goes on where it was stopped
    python -m benchmarks.study detection            # a table, from saved predictions alone

`plan` lists the trainings, `python -m benchmarks.study --help` the tables.
"""
