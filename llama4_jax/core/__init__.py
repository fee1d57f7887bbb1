"""What every layer of the code stands on: parameters with named axes."""
