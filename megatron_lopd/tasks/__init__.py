"""Verifiable tasks: where prompts come from and how answers are graded."""
