"""The ladder: ablations from REINFORCE to GRPO and its relatives, one idea at a time; see docs/ABLATIONS.md.

Reading order: rows.py (what is measured) -> measure.py (one run) -> schedule.py (which runs, in what order) ->
table.py, picture.py (what is shown). shows.py has one sentence per row, which states what the row shows.
"""
