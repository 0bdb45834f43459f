"""One training run: its steps, its rules, and what it leaves behind."""
