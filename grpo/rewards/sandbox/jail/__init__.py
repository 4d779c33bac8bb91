"""The processes that run untrusted programs, each in its own sandbox. grpo/rewards/sandbox/host.py starts them with

    python -S -B -m grpo.rewards.sandbox.jail of-PID

supervisor (__main__.py)   one process per batch: starts the programs, enforces time limits, kills leftover processes
  judge (inside.py)        one process per program, the first one in its sandbox: runs the tests
    program (inside.py)    one process per program: runs what the model wrote

The code of this folder needs only the standard library. Between judge and program, only names and plain data pass.
"""
