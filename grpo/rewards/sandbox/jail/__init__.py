"""Where programs that nobody trusts run, each behind walls of its own. Started by grpo/rewards/sandbox/host.py, as

    python -S -B -m grpo.rewards.sandbox.jail of-PID

supervisor (__main__.py)   one process a batch: starts the programs, keeps their time, ends what is left of them
  judge (inside.py)        one for each program, the first process of its sandbox: runs the tests
    program (inside.py)    what the model wrote

Nothing here needs more than the standard library, and nothing but a name and plain data crosses a wall.
"""
