"""What a trained model can do, in numbers and pictures."""
