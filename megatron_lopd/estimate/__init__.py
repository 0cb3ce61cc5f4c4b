"""What a run needs before anything is queued: memory per GPU, disk, FLOPs and hours. Imports no torch."""
