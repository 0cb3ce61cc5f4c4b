"""The stages of a recipe as SLURM jobs: which there are, their scripts, and putting them into the queue."""
