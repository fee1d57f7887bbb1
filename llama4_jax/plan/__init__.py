"""What a run needs and costs on chips that are not here: the real step, compiled for them, and its program counted."""
