"""The ladder: one idea at a time from REINFORCE to GRPO and its relatives, each measured; see docs/ABLATIONS.md.

Reading order: rows.py (what is measured) -> measure.py (one run) -> schedule.py (which runs, in what order) ->
table.py, picture.py (what is shown); shows.py has the sentence that says what each row shows.
"""
