"""One delivery of one run in this process: scheduler, steps, attempts, checkpoints, the end.

Imports observe, store, plan and errors; never Celery, kombu or SQL.
"""
