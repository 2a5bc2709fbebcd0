"""What nodes, a Postgres and a broker carry: measured costs, a model of them, the tables of docs/scaling.md."""
