"""What models learn from: sources, documents, packing and the loader that makes batches. Imports no model code."""
