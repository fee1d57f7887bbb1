"""Training: state, losses, optimiser, one jitted step, and a loop that survives being killed."""
