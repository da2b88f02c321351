"""``mpsl_dist report RUNS…``: one page that people show around, of what runs left behind."""
