"""One module for each kind of dataset, and what they share to read their annotation files."""
