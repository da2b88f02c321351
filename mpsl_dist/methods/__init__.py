"""How the actors train together: one module per method, and the loop that all of them share."""
