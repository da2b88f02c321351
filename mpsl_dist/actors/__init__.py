"""Who owns what: clients, server, and the models and data that each of them holds."""
