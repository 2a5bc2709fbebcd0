"""The SQL store: Postgres and SQLite through SQLAlchemy Core and psycopg.

The only room that knows SQLAlchemy and psycopg.
"""
