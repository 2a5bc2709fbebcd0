"""One run over many workers: stages, chunks, and how a batch is cut.

Imports engine and the rooms below it; never Celery: task publishes what this room asks for.
"""
