"""What runs cost and what they came to, for people: tables, figures and comparisons."""
