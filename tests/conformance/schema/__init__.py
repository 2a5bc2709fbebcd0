"""Every version of the tables that a release ever had, frozen as SQL with a few rows, for both databases."""
