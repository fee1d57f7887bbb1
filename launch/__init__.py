"""How experiments are started on more than one process: here, on TPU slices, under Kubernetes and under Slurm.

Each file prints a script or manifest, or starts processes; none imports what it starts.
"""
