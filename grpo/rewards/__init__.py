"""What rewards are made of, one kind a file; reward_model.py has the table."""
