"""One run over many workers: stages, chunks, and how a batch is cut.

Imports engine and what lies below it; never Celery: task publishes what this room asks for.
"""
